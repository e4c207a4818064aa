"""Start one run on this machine with the launcher of its engine, and follow it to its end."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from var_scale.config.schema import Config, EngineConfig
from var_scale.errors import EXIT_USER_ERROR, Preempted, UserError
from var_scale.jobs.nursery import Child, Nursery
from var_scale.launchers import without_launcher
from var_scale.locks import lock, take_lock
from var_scale.machine import gpu_count, has_gpu_driver
from var_scale.progress import Progress, progress, say
from var_scale.run_folder import EXIT_DIVERGED, EXIT_HUNG, EXIT_REQUEUE, RunFolder
from var_scale.train.stopping import PARENT_ENV, process_identity

STOP_PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.3
LAUNCHER_SECONDS = 40.0  # torchrun kills ranks that have not ended after 30


def process_count(engine: EngineConfig) -> int:
    """Processes of a run here: as configured, otherwise one per GPU, otherwise 2."""
    if engine.name == "single":
        return 1
    return engine.processes or gpu_count() or 2


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_command(
    config: Config, folder: Path, worker: str = "var_scale.train.worker"
) -> list[str]:
    """The command line that runs a module on every rank: python, torchrun, or DeepSpeed's launcher
    of one node."""
    count = process_count(config.engine)
    if config.engine.name == "single":
        return [sys.executable, "-m", worker, str(folder)]
    port = str(free_port())
    if config.engine.name == "deepspeed":
        nodes = json.dumps({"localhost": visible_devices(count)}).encode()
        return [
            *(sys.executable, "-m", "deepspeed.launcher.launch"),
            *("--world_info", base64.urlsafe_b64encode(nodes).decode()),
            *("--master_addr", "127.0.0.1", "--master_port", port),
            *("--no_local_rank", "--module", worker, str(folder)),
        ]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"),
        *("--nproc-per-node", str(count)),
        *("--master-addr", "127.0.0.1", "--master-port", port),
        *("-m", worker, str(folder)),
    ]


def visible_devices(count: int) -> list[str]:
    """The first `count` devices that the user lets this process see, as CUDA_VISIBLE_DEVICES names
    them: numbers, or the names of GPUs and their MIG parts.

    The `deepspeed` command would replace them by 0, 1, ... as soon as it is given a number of
    processes. On a machine without GPUs the variable may name fewer devices than there are
    processes; the missing ones are -1, which is no device.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(count)]
    return [*(name for name in given.split(",") if name), *count * ["-1"]][:count]


def launch_environment(config: Config) -> dict[str, str]:
    """The environment of the ranks: who started them, threads, and DeepSpeed's accelerator without
    a GPU. No launcher of a surrounding job is in it, and no file of the working folder is imported
    in place of a module."""
    env = without_launcher(os.environ)
    env |= {PARENT_ENV: process_identity(os.getpid()) or "", "PYTHONUNBUFFERED": "1"}
    env["PYTHONSAFEPATH"] = "1"
    # The ranks import the code of this process, also from a checkout that is not installed.
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (package_root, env.get("PYTHONPATH")) if p)
    if not has_gpu_driver():
        env.setdefault("OMP_NUM_THREADS", str(config.engine.threads))
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run_workers(config: Config, folder: Path, worker: str) -> None:
    """Run a module that is not a training run on every rank; its output goes to the terminal.

    Ctrl-C or SIGTERM: the file FOLDER/STOP asks the ranks to save, then Preempted is raised.

    Raises:
        UserError: a process failed.
    """
    (folder / "STOP").unlink(missing_ok=True)
    child = subprocess.Popen(
        launch_command(config, folder, worker),
        env=launch_environment(config),
        start_new_session=True,
    )
    try:
        if code := child.wait():
            raise UserError(
                f"{folder}: the processes exited with code {code}, see above; the same command "
                "continues",
                code="jobs.worker-failed",
            )
    except KeyboardInterrupt:
        (folder / "STOP").touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LAUNCHER_SECONDS)
        raise Preempted from None
    finally:
        if child.poll() is None:
            child.terminate()  # torchrun ends its ranks, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LAUNCHER_SECONDS)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def run_local(config: Config, run: RunFolder, label: str, nursery: Nursery | None = None) -> int:
    """Run to the end, showing progress; returns the exit code.

    With a nursery, a run of the engine `single` is started by it.

    Ctrl-C or SIGTERM: the run saves first, then Preempted is raised (KeyboardInterrupt if it could
    not save).

    Raises:
        UserError: another process runs this run.
    """
    folder = run.path.resolve()
    held = take_lock(folder / ".launcher.lock")
    if held is None:
        raise UserError(
            f"{folder}: another process is running this run; wait for it or stop it",
            code="jobs.run-locked",
        )
    run.set_status("queued")  # from here on, status.json was written by this attempt
    (folder / "STOP").unlink(missing_ok=True)
    run.log.mkdir(parents=True, exist_ok=True)
    with open(run.log / "launch.log", "ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start\n".encode())
        log.flush()
        child: Child | subprocess.Popen[bytes]
        if nursery and config.engine.name == "single":
            child = nursery.start(folder, log)
        else:
            child = subprocess.Popen(
                launch_command(config, folder),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=launch_environment(config),
                start_new_session=True,
            )
    try:
        return _follow(child, run, label)
    except (KeyboardInterrupt, SystemExit):
        if _stop(child, folder):
            wait_for_ranks(folder)
        if run.status()["state"] == "preempted":
            raise Preempted from None
        raise
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        os.close(held)


def _follow(child: Child | subprocess.Popen[bytes], run: RunFolder, label: str) -> int:
    """Show the progress that the run records until it ends."""
    # There is no step to show before the ranks have read the data and built the model.
    while child.poll() is None:
        status = run.status()
        if status.get("total_steps") and status["state"] == "running":
            break
        time.sleep(POLL_SECONDS)
    if child.poll() is not None:
        return _exit_code(child, run)
    with progress(label, status["total_steps"], "steps", status.get("step", 0)) as bar:
        while child.poll() is None:
            _show(bar, run)
            time.sleep(POLL_SECONDS)
        _show(bar, run)
    return _exit_code(child, run)


def _show(bar: Progress, run: RunFolder) -> None:
    """Update the bar from the last training row."""
    row = _last_row(run.metrics)
    if row:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        bar.update(row["step"], f"loss {loss}  {row['images_per_second']:,.0f} images/s")


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last complete training row of metrics.jsonl, read from the end of the file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith(b'{"kind": "train"'):
            return dict(json.loads(line))
    return None


def _exit_code(child: Child | subprocess.Popen[bytes], run: RunFolder) -> int:
    """The exit code by the run's own status, because launchers turn 85 into 1.

    Completes the status where the ranks could not: a rank that was killed writes nothing, and its
    peers only see that they lost a connection.
    """
    wait_for_ranks(run.path)
    code, status = child.returncode or 0, run.status()
    ends = {"complete": 0, "preempted": EXIT_REQUEUE, "diverged": EXIT_DIVERGED}
    if status["state"] in ends:
        return ends[status["state"]]
    log = run.log / "launch.log"
    killed = killed_rank(log) or (_killed("rank 0", -code) if code < 0 else "")
    if killed and (status["state"] != "failed" or status["cause"] == "lost-peer"):
        reason = f"{killed}; the same command continues"
        run.set_status("failed", reason, cause="rank-killed")
    elif status["state"] != "failed":
        reason = (
            f"the processes exited without an error message (exit code {code}); the same command "
            f"continues, {log} may show more"
        )
        run.set_status("failed", reason, cause="exited")
    return EXIT_HUNG if run.status()["cause"] == "hung" else code or 1


def wait_for_ranks(folder: Path) -> None:
    """Wait until no rank holds the run: ranks whose launcher died save on their own."""
    with lock(folder / ".lock", STOP_PATIENCE_SECONDS):
        pass


def _killed(rank: str, number: int) -> str:
    """A line about a rank that the signal `number` ended."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{rank} was ended by {name}, from outside or by the system (out of memory?)"


def killed_rank(log: Path) -> str:
    """One line about the rank that a signal ended since the last start; empty if there is none.

    A killed rank cannot record anything itself, and torchrun and DeepSpeed report it only in
    their output, so this is the one place that reads a launcher's log.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    text = re.split(r"^--- \d{4}-.* start$", text, flags=re.MULTILINE)[-1]
    pattern = r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: -(\d+)"  # torchrun
    for rank, number in re.findall(pattern, text):
        if int(number) != signal.SIGTERM:  # which is how the launcher ends the other ranks
            return _killed(f"rank {rank}", int(number))
    if found := re.search(r"exits with return code = -(\d+)", text):  # DeepSpeed
        return _killed("a rank", int(found.group(1)))
    return ""


def _stop(child: Child | subprocess.Popen[bytes], folder: Path) -> bool:
    """Request a stop and wait until the run has saved; false if a second Ctrl-C ends the wait."""
    say("stopping: the run saves its state first (press Ctrl-C again to kill it)")
    (folder / "STOP").touch()
    deadline = time.monotonic() + STOP_PATIENCE_SECONDS
    try:
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return True
    except KeyboardInterrupt:
        say("killed; the run continues from its last checkpoint")
        return False


def train_here(
    config: Config,
    run: RunFolder,
    label: str,
    may_diverge: bool = False,
    nursery: Nursery | None = None,
) -> None:
    """Run, and turn a bad end into one clear line.

    Args:
        may_diverge: print that the run diverged instead of raising.
        nursery: starts the run if its engine is `single`.

    Raises:
        Preempted: the run was stopped after it saved.
        UserError: it failed; the code is the cause in status.json.
    """
    code = run_local(config, run, label, nursery)
    if code == 0:
        return
    status = run.status()
    if may_diverge and status["state"] == "diverged":
        say(f"run {config.name}: diverged: {status['reason']}")
        return
    if code == EXIT_REQUEUE:
        raise Preempted
    reason = status["reason"] or f"see {run.log / 'launch.log'}"
    raise UserError(
        f"{run.path}: the run {status['state']}: {reason}",
        code="jobs.run-failed",
        exit_code=code if code in (EXIT_DIVERGED, EXIT_HUNG) else EXIT_USER_ERROR,
    )
