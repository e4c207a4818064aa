"""What goes wrong in long runs, provoked in real ones."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.runs import final, losses, rewind, run, small_config
from var_scale.cluster.local import launch_command, launch_environment
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import checkpoints
from var_scale.train.loop import create_run

DDP = {"name": "ddp", "processes": 2}
ENGINES = {
    "ddp": DDP,
    "fsdp": {"name": "fsdp", "processes": 2},
    **{f"zero{z}": {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": z}}} for z in (0, 2, 3)},
}
BREAK = """
import os, sys
if os.environ.get("RANK", "0") == "{rank}" and "worker" in " ".join(sys.orig_argv):
    import time
    import var_scale.train.step as step
    plain, calls = step.TrainStep.forward, [0]
    def forward(self, *inputs):
        out = plain(self, *inputs)
        if self.training:
            calls[0] += 1
            if calls[0] in {calls}:
                {what}
        return out
    step.TrainStep.forward = forward
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes rank 1 do something at its n-th forward passes: a file that Python reads at every start."""

    def make(calls: object, what: str, rank: int = 1) -> None:
        text = BREAK.replace("{calls}", str(calls)).replace("{what}", what).replace("{rank}", str(rank))
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


INFINITE = "out = (out[0] * float('inf'), *out[1:])"


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES if name != "ddp")])
def test_a_step_that_is_not_finite_is_not_taken(name: str, broken, tmp_path: Path) -> None:
    """One rank's gradient is infinite once: all ranks leave that step out, and the run goes on as if it had not been."""
    broken([8], INFINITE)
    code, folder = run(small_config(tmp_path / "data", engine=ENGINES[name]), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows if row.get("skipped")] == [8] and rows[7]["loss"] is not None
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[-1]["loss"] < rows[0]["loss"] - 0.1


@pytest.mark.parametrize("name", ["single", pytest.param("zero1", marks=pytest.mark.slow)])
def test_going_on_after_a_step_that_was_not_taken(name: str, broken, tmp_path: Path) -> None:
    """AdamW counts the steps it took: a run stopped and continued after one was left out ends with the same bits. On one process the
    loss is not finite on all ranks, which the progress line must survive."""
    engine = {"name": "single"} if name == "single" else {**ENGINES["zero2"], "deepspeed": {"zero_optimization": {"stage": 1}}}
    broken([4], INFINITE, rank=0 if name == "single" else 1)
    recipe = {"keep_steps": [8], "ema": 0.9}
    code, whole = run(small_config(tmp_path / "data", engine=engine, train=recipe), tmp_path / "whole")
    assert code == 0 and [row["step"] for row in whole.read_metrics() if row.get("skipped")] == [4]
    end = checkpoints(whole.checkpoints)[-1].state
    assert end["skipped_steps"] == 1
    broken([], "pass", rank=9)
    rewind(whole, 8)
    code, again = run(small_config(tmp_path / "data", engine=engine, train=recipe), tmp_path / "whole")
    assert code == 0 and checkpoints(again.checkpoints)[-1].state["files"] == end["files"]
    assert [c.step for c in checkpoints(again.checkpoints)] == [8, 20]


def test_going_back_passes_over_the_samples(broken, tmp_path: Path) -> None:
    """rollback: from the last checkpoint on, with later samples; recorded in the metrics."""
    broken([8], INFINITE)
    recipe = {"nonfinite": "rollback", "checkpoint_seconds": 1e-6, "keep_checkpoints": 100}
    code, folder = run(small_config(tmp_path / "data", engine=ENGINES["fsdp"], train=recipe), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    rows = folder.read_metrics()
    back = [row for row in rows if row["kind"] == "restart"]
    assert [(row["step"], row["from"], row["passed_over"]) for row in back] == [(7, 8, 1)]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
    other, plain = run(small_config(tmp_path / "data", train={"steps": 20}), tmp_path / "plain")
    assert other == 0 and losses(plain)[:7] == pytest.approx(losses(folder)[:7], rel=1e-5) and losses(plain)[7] != losses(folder)[7]


@pytest.mark.parametrize(("recipe", "calls", "text"), [({"nonfinite": "stop"}, [5], "step 5: 1 of 1 steps"),
                                                       ({"nonfinite_limit": 3}, range(5, 99), "step 7: 3 steps in a row")])  # fmt: skip
def test_when_it_stops(recipe: dict[str, object], calls: object, text: str, broken, tmp_path: Path) -> None:
    """stop: at once; skip: after so many in a row."""
    broken(calls, INFINITE)
    code, folder = run(small_config(tmp_path / "data", engine=DDP, train=recipe), tmp_path / "run")
    status = folder.status()
    assert code != 0 and status["state"] == "diverged" and text in status["reason"], status


def test_a_hanging_rank_is_named(broken, tmp_path: Path) -> None:
    """Rank 1 sleeps in its forward pass: the run ends by itself, says so, and leaves every rank's stack."""
    broken([5], "time.sleep(1000)")
    began = time.monotonic()
    code, folder = run(small_config(tmp_path / "data", engine=DDP, train={"hang_seconds": 8}), tmp_path / "run")
    assert code != 0 and time.monotonic() - began < 60
    status = folder.status()
    assert status["state"] == "failed" and "rank 1 is in forward of step 4, others wait in" in status["reason"], status
    assert "sitecustomize" in (folder.log / "hang-rank-1.txt").read_text()
    assert (folder.log / "hang-rank-0.txt").exists()


@pytest.mark.slow
def test_a_silent_rank_is_named(tmp_path: Path) -> None:
    """Rank 1 is stopped by the system: it cannot say anything any more."""
    psutil = pytest.importorskip("psutil")
    config, path = small_config(tmp_path / "data", engine=DDP, train={"steps": 10000, "hang_seconds": 8}), tmp_path / "run"
    create_run(config, path)
    process = subprocess.Popen(launch_command(config, path), env=launch_environment(config), start_new_session=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    folder = RunFolder(path)
    try:
        while len(folder.read_metrics()) < 10:
            assert process.poll() is None
            time.sleep(0.1)
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "worker" in " ".join(child.cmdline())]
        rank = next(child for child in ranks if child.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGSTOP)
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = folder.status()
    assert status["state"] == "failed" and "rank 1 does not answer, last seen in" in status["reason"], status


@pytest.mark.slow
def test_out_of_memory_is_one_line(tmp_path: Path) -> None:
    """A batch that does not fit: the peak, and what to change."""
    config = small_config(tmp_path, train={"batch_size": 8192 * 64, "steps": 1})
    folder = create_run(config, tmp_path / "run")
    limit = 6 << 30

    def small_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    process = subprocess.run(launch_command(config, tmp_path / "run"), env=launch_environment(config), preexec_fn=small_memory,
                             capture_output=True, text=True, check=False)  # fmt: skip
    status = folder.status()
    assert process.returncode != 0 and status["state"] == "failed", process.stderr[-2000:]
    assert "out of memory: this process held" in status["reason"] and "train.accumulate" in status["reason"], status
    assert "Traceback" not in process.stderr


def test_the_options_together_and_what_they_record(tmp_path: Path) -> None:
    """Averaged weights, z-loss, weights of scales, progressive training, recomputation: one run with all, evaluated both ways."""
    recipe = {"ema": 0.5, "z_loss": 1e-4, "scale_weights": "scale", "progressive": 0.5, "progressive_start": 0, "evals": 2}
    engine = {**ENGINES["fsdp"], "recompute": "block", "reshard_after_forward": False}
    code, folder = run(small_config(tmp_path / "data", train=recipe, engine=engine, log={"activations": True}), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row.get("stage") for row in rows][:2] == [0, 0] and rows[-1].get("stage") is None
    assert len(rows[0]["loss_per_scale"]) == 1 and len(rows[-1]["loss_per_scale"]) == 3
    assert rows[0]["tokens_per_second"] / rows[0]["images_per_second"] == pytest.approx(1)
    assert rows[-1]["memory_bytes"] > 1e8 and rows[-1]["step_seconds"] > rows[-1]["data_seconds"] >= 0
    largest, rms = rows[5]["activation_max"], rows[5]["activation_rms"]
    assert len(rms) == 2 and all(m > r > 0 for m, r in zip(largest, rms, strict=True))
    last = final(folder)
    assert last["ema_loss_avg"] != last["loss_avg"] and last["ema_loss_avg"] == pytest.approx(last["loss_avg"], rel=0.2)
