"""Training processes that stay up and train one run after another, in place of a launch per run.

Starting two ranks costs several seconds of imports, a run of twenty steps a fraction of one.
The test writes each run's folder into a job file; every rank reads it, trains, and writes its
exit code beside it. `python -m torch.distributed.run ... -m tests.ranks INBOX` is such a rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from tests.runs import prepare, process_as_before
from var_scale.config.schema import Config
from var_scale.files import read_json, write_json
from var_scale.run_folder import EXIT_DIVERGED, EXIT_REQUEUE, RunFolder
from var_scale.train.create import create_run
from var_scale.train.fault import FAULT_ENV
from var_scale.train.stopping import end_with_launcher, process_identity
from var_scale.train.worker import train
from var_scale.train.world import World, start_world

ROOT = Path(__file__).parents[1]
OWNER_ENV = "VAR_SCALE_TEST_OWNER"  # "pid:start time" of the test process
ORDERLY = (0, EXIT_DIVERGED, EXIT_REQUEUE)  # ends at which all ranks are at the same place
RUN_SECONDS = 1500.0  # the longest that one run may take
OTHERS_SECONDS = 15.0  # how long the others may take to fail after the first rank has failed


class Ranks:
    """`size` training processes, started at the first run. After a run that failed they are
    started again, because their collectives may no longer match."""

    def __init__(self, size: int, folder: Path):
        self.size, self.folder = size, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.jobs = self.starts = 0

    def run(self, config: Config, folder: Path) -> tuple[int, RunFolder]:
        """Train a run on these ranks. It leaves the files that a launch leaves, log/launch.log
        among them. The ranks see VAR_SCALE_FAULT as it is now, and the rest of the environment as
        it was when they started."""
        assert config.engine.processes == self.size, "a group has a fixed number of ranks"
        created = create_run(config, folder)
        prepare(created)
        self._start()
        try:
            codes = self._train(created)
        except BaseException:
            self.close()
            raise
        self.jobs += 1
        worst = next((code for code in codes if code not in ORDERLY), codes[0] if codes else 1)
        if worst not in ORDERLY or len(codes) < self.size:
            self.close()
        return worst, created

    def _train(self, run: RunFolder) -> list[int]:
        """Hand the run to the ranks and wait for their exit codes."""
        inbox = self._inbox()
        job = {"folder": str(run.path.resolve()), "fault": os.environ.get(FAULT_ENV, "")}
        write_json(inbox / f"{self.jobs}.json", job)
        return self._wait(inbox, run)

    def close(self) -> None:
        """Kill the ranks, which ends torchrun; kill it too if it does not end."""
        if self.process is None:
            return
        for path in self._inbox().glob("pid-*"):
            if alive(rank := path.read_text()):
                os.kill(int(rank.partition(":")[0]), signal.SIGKILL)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    def _inbox(self) -> Path:
        return self.folder / f"group-{self.starts}"

    def _start(self) -> None:
        if self.process and self.process.poll() is None:
            return
        self.starts, self.jobs = self.starts + 1, 0
        inbox = self._inbox()
        inbox.mkdir(parents=True)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(self.size), "-m", "tests.ranks", str(inbox)),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            OWNER_ENV: process_identity(os.getpid()) or "",
        }
        with open(inbox / "launch.log", "wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, inbox: Path, run: RunFolder) -> list[int]:
        """The exit codes of the ranks that reported one: of all, unless one of them failed."""
        assert self.process
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            found = [inbox / f"{self.jobs}.rank-{rank}" for rank in range(self.size)]
            codes = [int(path.read_text()) for path in found if path.exists()]
            if len(codes) == self.size or time.monotonic() > deadline:
                return codes
            if any(code not in ORDERLY for code in codes):
                deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
            if self.process.poll() is not None:
                text = (inbox / "launch.log").read_text(errors="replace")
                raise AssertionError(f"{run.path}: the group of ranks has ended:\n{text[-4000:]}")
            time.sleep(0.02)


def serve(inbox: Path) -> NoReturn:
    """Train the runs of the job files one after another, as one rank of the group."""
    threading.Thread(target=end_with, args=(os.environ[OWNER_ENV],), daemon=True).start()
    end_with_launcher()
    (inbox / f"pid-{os.environ['RANK']}").write_text(process_identity(os.getpid()) or "")
    world = start_world(group=True, threads=1)
    job = 0
    while True:
        path = inbox / f"{job}.json"
        if not path.exists():
            time.sleep(0.02)
            continue
        code = _train(world, read_json(path))
        write_json(inbox / f"{job}.rank-{world.rank}", code)
        job += 1


def end_with(owner: str) -> None:
    """End this process when the test process has ended for any reason."""
    while alive(owner):
        time.sleep(0.5)
    os._exit(1)


def alive(identity: str) -> bool:
    """Whether the process of an identity "pid:start time" is running."""
    return process_identity(int(identity.partition(":")[0])) == identity


def _train(world: World, job: dict[str, str]) -> int:
    """Train one run, whose log receives all output of this process during that time."""
    folder = RunFolder(Path(job["folder"]))
    os.environ[FAULT_ENV] = job["fault"]
    before = [os.dup(stream) for stream in (1, 2)]
    log = os.open(folder.log / "launch.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        with process_as_before():
            return train(folder, world)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), before, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(log)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
