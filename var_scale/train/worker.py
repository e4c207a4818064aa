"""What a launcher starts on every rank: `python -m var_scale.train.worker RUN_FOLDER`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.errors import EXIT_USER_ERROR, UserError
from var_scale.files import full_disk
from var_scale.locks import take_lock
from var_scale.run_folder import RunFolder
from var_scale.train.stopping import PARENT_ENV, StopRequest

if TYPE_CHECKING:
    from var_scale.train.world import World

OTHER_SECONDS = 10.0
"""How long a failing rank waits for rank 0 to record the reason, before it does so itself."""
LOST_PEER = re.compile(r"onnection (reset|closed|refused)|NCCL.*remote")
"""torch reports a lost peer only in the text of a RuntimeError."""


def main() -> None:
    """Join the other ranks, train, and exit with the run's code; status.json gets every failure."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    run = RunFolder(Path(arguments[0]))
    # Before torch is imported, which takes seconds: a signal that comes meanwhile is not lost.
    stop = StopRequest(run.path / "STOP")
    from var_scale.config.load import load
    from var_scale.train.world import leave, start_world

    if logs := os.environ.get("VAR_SCALE_LOGS"):
        _log_to(Path(logs))
    try:
        config = load(str(run.config))
        # Longer than the watchdog's patience: it names the rank that hangs, a time-out does not.
        timeout = 2 * config.train.hang_seconds + 300
        world = start_world(config.engine.name != "single", config.engine.threads, timeout)
    except UserError as error:
        print(f"error: {error}", flush=True)
        run.set_status("failed", str(error), cause=error.code)
        sys.exit(error.exit_code)
    _take_run(run, world)
    leave(world, train(run, world, stop))


def train(run: RunFolder, world: World, stop: StopRequest | None = None) -> int:
    """Train a run on this rank; returns the exit code. status.json gets the reason of a failure.

    Args:
        stop: the request to stop of this process, if it exists already.
    """
    from var_scale.train.loop import open_run

    try:
        training = open_run(run, world, stop or StopRequest(run.path / "STOP"))
        try:
            return training.train()
        finally:
            training.close()
    except UserError as error:
        _fail(run, world, str(error), error.code)
        return error.exit_code
    except Exception as error:
        _fail(run, world, *_explain(error, world))
        return 1


def _take_run(run: RunFolder, world: World) -> None:
    """Lock the run folder until this process ends, or exit if another process trains the run.

    All ranks wait here: none looks for a checkpoint while an earlier attempt may still write one.
    """
    from var_scale.train.world import WORLD_ENV, leave

    lock = take_lock(run.path / ".lock", wait_seconds=60) if world.main else None
    if world.main and lock is not None and not {PARENT_ENV, WORLD_ENV} & os.environ.keys():
        # It stopped an earlier attempt. `var-scale train` removes it before it starts the ranks.
        (run.path / "STOP").unlink(missing_ok=True)
    if world.largest(int(world.main and lock is None)):
        if world.main:
            print(
                f"error: {run.path}: another process is training this run; stop it first",
                flush=True,
            )
        leave(world, EXIT_USER_ERROR)


def _explain(error: Exception, world: World) -> tuple[str, str]:
    """One line about an unexpected error, and its cause."""
    if reason := out_of_memory(error, world):
        return reason, "out-of-memory"
    if full := full_disk(error, getattr(error, "filename", None) or "the log of the run"):
        return str(full), full.code
    traceback.print_exc()
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, RuntimeError) and LOST_PEER.search(reason):
        return (
            "lost the connection to another rank: it was killed, or its node failed; the same "
            "command continues",
            "lost-peer",
        )
    return reason, "crashed"


def _log_to(folder: Path) -> None:
    """Send everything that this process prints to a file of its rank."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    file = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)


def out_of_memory(error: Exception, world: World) -> str:
    """One line about an allocation that failed; empty for another error."""
    import torch

    text = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not known and "DefaultCPUAllocator" not in text:
        return ""
    from var_scale.train.telemetry import peak_memory

    asked = re.search(r"allocate ([\d.]+ ?\w*)", text)
    more = f" and requested {asked.group(1)} more" if asked else ""
    return (
        f"out of memory: this process held at most {peak_memory(world.device) / 2**30:.2f} GiB"
        f"{more}; raise train.accumulate (smaller micro-batches), set engine.recompute=mlp or "
        "block, or spread the state over more processes (engine=fsdp or zero3)"
    )


def _fail(run: RunFolder, world: World, reason: str, cause: str) -> None:
    """Record why this rank ends.

    Launchers kill all processes as soon as one has ended. Another rank therefore gives rank 0 the
    time to record its own reason, and records this one itself if rank 0 has none (it waits for
    this rank).
    """
    if not world.main:
        deadline = time.monotonic() + OTHER_SECONDS
        while time.monotonic() < deadline:
            if run.status()["state"] == "failed":
                return
            time.sleep(0.1)
        reason = f"rank {world.rank}: {reason}"
    print(f"error: {reason}", flush=True)
    with contextlib.suppress(UserError, OSError):  # the disk may be full
        # The first rank to fail has the cause; what the others meet afterwards follows from it.
        if run.status()["state"] != "failed":
            run.set_status("failed", reason, cause=cause)


if __name__ == "__main__":
    main()
