"""Killed again and again at random moments, a run ends with the bits it would have had. VAR_SCALE_SOAK_KILLS sets how often."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import run, small_config
from var_scale.cluster.local import launch_command, launch_environment, run_local
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import checkpoints
from var_scale.train.loop import create_run

KILLS = int(os.environ.get("VAR_SCALE_SOAK_KILLS", "3"))
ENGINES = {
    "fsdp": {"name": "fsdp", "processes": 2},
    "zero2": {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": 2}}},
}


def ranks_of(process: subprocess.Popen[bytes]) -> list[object]:
    """The training processes of a launcher."""
    psutil = pytest.importorskip("psutil")
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "var_scale.train.worker" in child.cmdline()]
    except psutil.Error:
        return []


def full_rows(folder: RunFolder) -> dict[int, float]:
    """Losses of the rows over three steps; a polite stop in between, as at the launcher's death, splits a row."""
    return {row["step"]: row["loss"] for row in folder.read_metrics() if row["kind"] == "train" and row["steps"] == 3}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ENGINES)
def test_soak(name: str, tmp_path: Path) -> None:
    """kill -9 of one rank, of all, of the launcher; checkpoints at every look, so that many kills fall into a save."""
    recipe = {"steps": 60 * KILLS, "precision": "bf16", "checkpoint_seconds": 1e-6, "keep_checkpoints": 3, "ema": 0.99}
    config = small_config(tmp_path / "data", train=recipe, engine=ENGINES[name], log={"every": 3})
    code, whole = run(config, tmp_path / "whole")
    assert code == 0
    path, rng = tmp_path / "run", random.Random(time.time_ns())
    create_run(config, path)
    folder, lives = RunFolder(path), []
    for _ in range(KILLS):
        before = len(folder.read_metrics())
        process = subprocess.Popen(launch_command(config, path), env=launch_environment(config), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 60
        while len(folder.read_metrics()) < before + rng.randint(1, 6) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        what, ranks = rng.choice(("all", "rank", "launcher")), ranks_of(process)
        if what == "rank" and ranks:
            rng.choice(ranks).kill()  # type: ignore[attr-defined]
        elif what == "launcher":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (process.poll() is None or any(rank.is_running() for rank in ranks)) and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        lives.append((what, len(folder.read_metrics())))
    assert run_local(config, folder, "test") == 0, (folder.log / "launch.log").read_text()[-2000:]
    mine, undisturbed = full_rows(folder), full_rows(whole)
    assert mine.items() <= undisturbed.items() and len(mine) > 0.6 * len(undisturbed), lives
    one, two = checkpoints(folder.checkpoints)[-1], checkpoints(whole.checkpoints)[-1]
    assert one.step == two.step and one.state["files"] == two.state["files"], lives
    assert not list(folder.checkpoints.glob(".*"))
