"""Start one run on this machine with its engine's launcher, and follow it to its end."""

from __future__ import annotations

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
from var_scale.errors import Preempted, UserError
from var_scale.progress import Progress, progress, say
from var_scale.run_folder import EXIT_DIVERGED, EXIT_HUNG, EXIT_REQUEUE, RunFolder, take_lock
from var_scale.train.stopping import PARENT_ENV, process_identity

STOP_PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.3
LAUNCHER_SECONDS = 40.0  # torchrun kills ranks that have not ended after 30
LOST_PEER = "lost the connection to another rank"


def process_count(engine: EngineConfig) -> int:
    """Processes of a run here: as configured, else one a GPU, else 2."""
    if engine.name == "single":
        return 1
    if engine.processes:
        return engine.processes
    import torch

    return torch.cuda.device_count() or 2


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_command(config: Config, folder: Path, worker: str = "var_scale.train.worker") -> list[str]:
    """The command line that runs a module on every rank: python, torchrun, or the `deepspeed` launcher."""
    count = str(process_count(config.engine))
    if config.engine.name == "single":
        return [sys.executable, "-m", worker, str(folder)]
    port = str(free_port())
    if config.engine.name == "deepspeed":
        options = ["--num_nodes", "1", "--num_gpus", count, "--master_addr", "127.0.0.1", "--master_port", port, "--no_local_rank"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--module", worker, str(folder)]
    options = ["--nnodes", "1", "--nproc-per-node", count, "--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", worker, str(folder)]


def launch_environment(config: Config) -> dict[str, str]:
    """The run's environment: who started it, threads, and DeepSpeed's accelerator where there is no GPU."""
    env = {**os.environ, PARENT_ENV: process_identity(os.getpid()) or "", "PYTHONUNBUFFERED": "1"}
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (package_root, env.get("PYTHONPATH")) if p)
    if not Path("/dev/nvidiactl").exists():
        env.setdefault("OMP_NUM_THREADS", str(config.engine.threads))
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run_workers(config: Config, folder: Path, worker: str) -> None:
    """Run a module that is no training run on every rank, its output to the terminal. UserError if it fails. Ctrl-C or SIGTERM: the ranks
    are asked by FOLDER/STOP to save, then Preempted."""
    (folder / "STOP").unlink(missing_ok=True)
    child = subprocess.Popen(launch_command(config, folder, worker), env=launch_environment(config), start_new_session=True)
    try:
        if code := child.wait():
            raise UserError(f"{folder}: the processes ended with code {code}, see above; the same command continues")
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


def run_local(config: Config, run: RunFolder, label: str) -> int:
    """Run to its end, showing progress; returns the exit code. Ctrl-C or SIGTERM: the run saves first, then Preempted (KeyboardInterrupt
    if it could not)."""
    folder = run.path.resolve()
    lock = take_lock(folder / ".launcher.lock")
    if lock is None:
        raise UserError(f"{folder}: another process is running this run; wait for it or stop it")
    run.set_status("queued")  # whatever is found here afterwards was said by this life of the run
    (folder / "STOP").unlink(missing_ok=True)
    run.log.mkdir(parents=True, exist_ok=True)
    with open(run.log / "launch.log", "ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start\n".encode())
        log.flush()
        child = subprocess.Popen(
            launch_command(config, folder), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=launch_environment(config), start_new_session=True,
        )  # fmt: skip
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
        os.close(lock)


def _follow(child: subprocess.Popen[bytes], run: RunFolder, label: str) -> int:
    """Show the run's own records until it ends."""
    while child.poll() is None and not (run.status().get("total_steps") and run.status()["state"] == "running"):
        time.sleep(POLL_SECONDS)
    if child.poll() is not None:
        return _exit_code(child, run)
    status = run.status()
    with progress(label, status.get("total_steps", 0), "steps", status.get("step", 0)) as bar:
        while child.poll() is None:
            _show(bar, run)
            time.sleep(POLL_SECONDS)
        _show(bar, run)
    return _exit_code(child, run)


def _show(bar: Progress, run: RunFolder) -> None:
    """One look at the newest row."""
    row = _last_row(run.metrics)
    if row:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        bar.update(row["step"], f"loss {loss}  {row['images_per_second']:,.0f} images/s")


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row of a step in metrics.jsonl, read from the end."""
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


def _exit_code(child: subprocess.Popen[bytes], run: RunFolder) -> int:
    """The run's own verdict where the launcher hides it: launchers turn 85 into 1."""
    wait_for_ranks(run.path)
    code, status = child.returncode, run.status()
    if status["state"] == "complete":
        return 0
    if status["state"] == "preempted":
        return EXIT_REQUEUE
    if status["state"] == "diverged":
        return EXIT_DIVERGED
    killed = killed_rank(run.log / "launch.log")
    if status["state"] in ("queued", "running"):  # the processes are gone and could not say why
        why = killed or f"the processes ended without a word (exit code {code})"
        run.set_status("failed", f"{why}; the same command continues, {run.log / 'launch.log'} may say more")
    elif killed and LOST_PEER in status["reason"]:
        run.set_status("failed", f"{killed}; the same command continues")
    return EXIT_HUNG if status["reason"].startswith("no progress") else code or 1


def wait_for_ranks(folder: Path) -> None:
    """Ranks that have lost their launcher save by themselves: until none holds the run."""
    lock = take_lock(folder / ".lock", STOP_PATIENCE_SECONDS)
    if lock is not None:
        os.close(lock)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def killed_rank(log: Path) -> str:
    """Which rank a signal ended, as the launcher's log has it since the last start; empty if none."""
    text = re.split(r"^--- \d{4}-.* start$", log.read_text(errors="replace"), flags=re.MULTILINE)[-1] if log.exists() else ""
    for rank, number in re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: -(\d+)", text):
        if (name := _signal_name(int(number))) != "SIGTERM":  # that is how launchers end the others
            return f"rank {rank} was ended by {name}, from outside or by the system (out of memory?)"
    if found := re.search(r"exits with return code = -(\d+)", text):
        return f"a rank was ended by {_signal_name(int(found.group(1)))}, from outside or by the system (out of memory?)"
    return ""


def _stop(child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Ask for a stop and wait until the run has saved; false when a second Ctrl-C ends the waiting."""
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


def train_here(config: Config, run: RunFolder, label: str, may_diverge: bool = False) -> None:
    """Run and turn a bad end into one clear line. `may_diverge`: a run whose loss exploded is reported, not an error."""
    code = run_local(config, run, label)
    if code == 0:
        return
    status = run.status()
    if may_diverge and status["state"] == "diverged":
        say(f"run {config.name}: diverged: {status['reason']}")
        return
    if code == EXIT_REQUEUE:
        raise Preempted
    error = UserError(f"{run.path}: the run {status['state']}: {status['reason'] or 'see ' + str(run.log / 'launch.log')}")
    error.code = code if code in (EXIT_DIVERGED, EXIT_HUNG) else error.code
    raise error
