"""What a launcher starts on every rank: `python -m var_scale.train.worker RUN_FOLDER`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

from var_scale.config.load import load
from var_scale.errors import UserError
from var_scale.run_folder import RunFolder, take_lock
from var_scale.train.stopping import PARENT_ENV
from var_scale.train.world import WORLD_ENV, World, leave, start_world

USER_ERROR = 2
SPEAK_SECONDS = 10.0


def main() -> None:
    """Join the others, train, leave with the run's exit code. A failure is kept in status.json."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    folder = Path(arguments[0])
    run = RunFolder(folder)
    if logs := os.environ.get("VAR_SCALE_LOGS"):
        _log_to(Path(logs))
    try:
        config = load(str(run.config))
    except UserError as error:
        print(f"error: {error}", flush=True)
        run.set_status("failed", str(error))
        sys.exit(error.code)
    timeout = 2 * config.train.hang_seconds + 300  # the watchdog is to speak first
    try:
        world = start_world(config.engine.name != "single", config.engine.threads, timeout)
    except UserError as error:
        print(f"error: {error}", flush=True)
        run.set_status("failed", str(error))
        sys.exit(error.code)
    lock = take_lock(folder / ".lock", wait_seconds=60) if world.main else None
    if world.main and lock is not None and not {PARENT_ENV, WORLD_ENV} & os.environ.keys():
        (folder / "STOP").unlink(missing_ok=True)  # it stopped an earlier life; `var-scale train` removes it before it starts the ranks
    refused = torch.tensor(float(world.main and lock is None), device=world.device)
    if float(world.reduce(refused)) > 0:  # all ranks wait here: none looks for a checkpoint while an earlier life may still write one
        if world.main:
            print(f"error: {folder}: another process is training this run; stop it first", flush=True)
        leave(world, USER_ERROR)
    code = 1
    try:
        from var_scale.train.loop import Run

        training = Run(folder, world)
        try:
            code = training.train()
        finally:
            training.close()
    except UserError as error:
        code = USER_ERROR
        _fail(run, world, str(error))
    except Exception as error:
        if not (reason := out_of_memory(error, world)):
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, RuntimeError) and re.search(r"onnection (reset|closed|refused)|NCCL.*remote", reason):
                reason = "lost the connection to another rank: it was killed, or its node is gone; the same command continues"
        _fail(run, world, reason)
    leave(world, code)


def _log_to(folder: Path) -> None:
    """Put all that this process says into a file of its rank."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    file = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)


def out_of_memory(error: Exception, world: World) -> str:
    """One line for an allocation that failed; empty for another error."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in text:
        return ""
    from var_scale.train.telemetry import peak_memory

    asked = re.search(r"allocate ([\d.]+ ?\w*)", text)
    more = f", and {asked.group(1)} more were asked for" if asked else ""
    return (f"out of memory: this process held {peak_memory(world.device) / 2**30:.2f} GiB at most{more}; raise train.accumulate (smaller "
            "micro-batches), set engine.recompute=mlp or block, or share the state over more processes (engine=fsdp, zero3)")  # fmt: skip


def _fail(run: RunFolder, world: World, reason: str) -> None:
    """Keep the reason. Launchers end all processes as soon as one has ended: another rank leaves rank 0 the time to speak, and speaks
    itself where rank 0 has nothing to say (it waits for this one)."""
    if not world.main:
        deadline = time.monotonic() + SPEAK_SECONDS
        while time.monotonic() < deadline:
            if run.status()["state"] == "failed":
                return
            time.sleep(0.1)
        reason = f"rank {world.rank}: {reason}"
    print(f"error: {reason}", flush=True)
    with contextlib.suppress(UserError, OSError):  # the disk may be full
        if run.status()["state"] != "failed":  # the first to fail is the cause, what others meet then is its consequence
            run.set_status("failed", reason)


if __name__ == "__main__":
    main()
