"""Runs in lanes: their order, how many at a time, and how all of them stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.raises import raises
from tests.runs import small_config
from var_scale.config.schema import Config
from var_scale.errors import Preempted, UserError
from var_scale.jobs import lanes
from var_scale.jobs.lanes import Job, train_together
from var_scale.run_folder import RunFolder


class Ranks:
    """In place of processes: `train_here` that records what runs when."""

    def __init__(self, work: Callable[[RunFolder], None]):
        self.work, self.lock = work, threading.Lock()
        self.begun: list[str] = []
        self.now = self.most = 0

    def __call__(self, config: Config, run: RunFolder, label: str, **_: object) -> None:
        with self.lock:
            self.begun.append(label)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self.work(run)
        finally:
            self.now -= 1


def until_stopped(run: RunFolder) -> None:
    """A run that trains until it is asked to stop, and saves; when it starts, which takes a
    moment, it removes an earlier request."""
    time.sleep(0.3)
    (run.path / "STOP").unlink(missing_ok=True)
    while not (run.path / "STOP").exists():
        time.sleep(0.01)
    run.set_status("preempted")
    raise Preempted


def jobs(root: Path, count: int) -> list[Job]:
    config = small_config(root / "data", engine={"name": "single"})
    return [(config, RunFolder(root / str(k)), str(k)) for k in range(count)]


def test_two_at_a_time_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, ended = threading.Barrier(2, timeout=5), []
    ranks = Ranks(lambda run: together.wait() and None)
    monkeypatch.setattr(lanes, "train_here", ranks)
    train_together(jobs(tmp_path, 4), 2, lambda: ended.append(1))
    assert ranks.most == 2 and set(ranks.begun[:2]) == {"0", "1"} and len(ranks.begun) == 4
    assert ended and (tmp_path / "3" / "config.yaml").exists()


def test_ctrl_c_lets_all_runs_save_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: RunFolder) -> None:
        if run.path.name == "0":
            return
        until_stopped(run)

    def after() -> None:
        raise KeyboardInterrupt

    ranks = Ranks(interrupted)
    monkeypatch.setattr(lanes, "train_here", ranks)
    with pytest.raises(Preempted):
        train_together(jobs(tmp_path, 6), 2, after)
    assert len(ranks.begun) < 6 and ranks.now == 0


def test_a_run_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(run: RunFolder) -> None:
        if run.path.name == "0":
            while len(ranks.begun) < 2:  # a run that had not begun would not be stopped
                time.sleep(0.01)
            raise UserError("the disk is full", code="jobs.run-failed")
        until_stopped(run)

    ranks = Ranks(failing)
    monkeypatch.setattr(lanes, "train_here", ranks)
    with raises("jobs.run-failed", "disk"):
        train_together(jobs(tmp_path, 6), 2, lambda: None)
    assert len(ranks.begun) < 6 and ranks.now == 0
    assert RunFolder(tmp_path / "1").status()["state"] == "preempted"
