"""A run that is killed many times at random moments ends with the same bits as an undisturbed
run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import Ranks
from tests.runs import ENGINES, launch_log, small_config
from var_scale.jobs.local import launch_command, launch_environment, run_local
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import checkpoints
from var_scale.train.create import create_run


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes of a launcher."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "var_scale.train.worker" in child.cmdline()]
    except psutil.Error:
        return []


def full_rows(folder: RunFolder) -> dict[int, float]:
    """Losses of the rows that cover three steps. When the launcher is killed, the ranks save and
    stop, which may split a row."""
    return {
        row["step"]: row["loss"]
        for row in folder.read_metrics()
        if row["kind"] == "train" and row["steps"] == 3
    }


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "kills"),
    [
        pytest.param("fsdp", 3, marks=pytest.mark.slow),
        pytest.param("fsdp", 50, marks=pytest.mark.nightly),
        pytest.param("zero2", 50, marks=pytest.mark.nightly),
    ],
)
def test_soak(name: str, kills: int, ranks: Ranks, tmp_path: Path) -> None:
    """kill -9 of one rank, of all, of the launcher. Checkpoints are saved at every row, so that
    many kills fall into a save."""
    recipe = {
        "steps": 60 * kills,
        "precision": "bf16",
        "checkpoint_seconds": 1e-6,
        "keep_checkpoints": 3,
        "ema": 0.99,
    }
    config = small_config(tmp_path / "data", train=recipe, engine=ENGINES[name], log={"every": 3})
    code, whole = ranks.run(config, tmp_path / "whole")
    assert code == 0, launch_log(whole)[-3000:]
    path, rng = tmp_path / "run", random.Random(time.time_ns())
    create_run(config, path)
    folder, attempts = RunFolder(path), []
    for _ in range(kills):
        before = len(folder.read_metrics())
        process = subprocess.Popen(
            launch_command(config, path),
            env=launch_environment(config),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while (
            len(folder.read_metrics()) < before + rng.randint(1, 6)
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        what, children = rng.choice(("all", "rank", "launcher")), ranks_of(process)
        if what == "rank" and children:
            rng.choice(children).kill()
        elif what == "launcher":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (
            process.poll() is None or any(child.is_running() for child in children)
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        attempts.append((what, len(folder.read_metrics())))
    assert run_local(config, folder, "test") == 0, launch_log(folder)[-2000:]
    mine, undisturbed = full_rows(folder), full_rows(whole)
    assert mine.items() <= undisturbed.items(), attempts
    assert len(mine) > 0.6 * len(undisturbed), attempts
    one, two = checkpoints(folder.checkpoints)[-1], checkpoints(whole.checkpoints)[-1]
    assert one.step == two.step and one.state["files"] == two.state["files"], attempts
    assert not list(folder.checkpoints.glob(".*"))
