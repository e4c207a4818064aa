"""Runs that are forks of one process: the same results and the same ends as runs of their own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runs import launch_log, losses, run_here, small_config
from var_scale.errors import EXIT_USER_ERROR
from var_scale.jobs.local import launch_environment, run_local
from var_scale.jobs.nursery import Nursery
from var_scale.run_folder import EXIT_REQUEUE, RunFolder
from var_scale.train.create import create_run

pytestmark = pytest.mark.xdist_group("nursery")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    config = small_config(tmp_path_factory.mktemp("data"))
    nursery = Nursery(launch_environment(config))
    yield nursery
    nursery.close()


def train(
    nursery: Nursery, root: Path, meanwhile: Callable[[RunFolder], None] | None = None, **train: int
) -> tuple[int, RunFolder]:
    """Train a run in the nursery; `meanwhile` is called when it has done some steps."""
    config = small_config(root / "data", train=train) if train else small_config(root / "data")
    run = create_run(config, root / "run")

    def watch() -> None:
        while len(run.read_metrics()) < 5:
            time.sleep(0.02)
        assert meanwhile
        meanwhile(run)

    thread = threading.Thread(target=watch, daemon=True)
    if meanwhile:
        thread.start()
    code = run_local(config, run, "test", nursery)
    if meanwhile:
        thread.join(timeout=60)
    return code, run


def test_the_same_losses(nursery: Nursery, tmp_path: Path) -> None:
    """Bit for bit those of a run in a process of its own, in a second fork as in the first."""
    code, whole = run_here(small_config(tmp_path / "data"), tmp_path / "whole")
    assert code == 0
    for name in ("first", "second"):
        code, run = train(nursery, tmp_path / name)
        assert code == 0, launch_log(run)
        assert losses(run) == losses(whole)
        assert "engine=single" in launch_log(run)


def test_input_that_cannot_be_used(nursery: Nursery, tmp_path: Path) -> None:
    config = small_config(tmp_path / "data")
    run = create_run(config, tmp_path / "run")
    (tmp_path / "data" / "val" / "manifest.json").unlink()
    assert run_local(config, run, "test", nursery) == EXIT_USER_ERROR
    assert run.status()["state"] == "failed" and "manifest.json" in run.status()["reason"]


def test_a_killed_run_is_named_and_the_next_one_trains(nursery: Nursery, tmp_path: Path) -> None:
    def kill(run: RunFolder) -> None:
        child = list(nursery._children.values())[-1]
        assert child.pid != os.getpid()
        os.kill(child.pid, signal.SIGKILL)

    code, run = train(nursery, tmp_path / "killed", kill, steps=100_000)
    assert code != 0 and run.status()["cause"] == "rank-killed"
    assert train(nursery, tmp_path / "next")[0] == 0


def test_runs_save_when_their_nursery_dies(nursery: Nursery, tmp_path: Path) -> None:
    """And another nursery takes its place for the next run."""

    def kill(run: RunFolder) -> None:
        assert nursery._process
        nursery._process.kill()

    code, run = train(nursery, tmp_path / "orphan", kill, steps=100_000)
    assert code == EXIT_REQUEUE and run.status()["state"] == "preempted"
    assert train(nursery, tmp_path / "next")[0] == 0


def test_a_nursery_that_cannot_start_says_why_in_the_log_of_its_run(tmp_path: Path) -> None:
    """Its run has failed, with the reason in the log from which its launcher reports."""
    broken = Nursery({"PYTHONHOME": str(tmp_path)})
    with (tmp_path / "launch.log").open("ab") as log:
        child = broken.start(tmp_path, log)
    assert child.ended.wait(60) and child.poll() == 1
    assert b"Fatal Python error" in (tmp_path / "launch.log").read_bytes()
    broken.close()
