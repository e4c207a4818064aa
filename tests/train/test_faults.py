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
import psutil
import pytest

from tests.runs import final, losses, rewind, run, small_config
from var_scale.cluster.local import launch_command, launch_environment
from var_scale.config.schema import Config
from var_scale.run_folder import EXIT_REQUEUE, RunFolder
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
        if self.training == {training}:
            calls[0] += 1
            if calls[0] in {calls}:
                {what}
        return out
    step.TrainStep.forward = forward
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes rank 1 do something at its n-th forward passes: a file that Python reads at every start."""

    def make(calls: object, what: str, rank: int = 1, training: bool = True) -> None:
        values = {"calls": calls, "what": what, "rank": rank, "training": training}
        text = BREAK
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


SLOW_DISK = """
import os, sys, time
if os.environ.get("RANK") == "1" and "worker" in " ".join(sys.orig_argv):
    import var_scale.data.loader as loader
    plain = loader.TokenData.gather
    def gather(self, *arguments):
        time.sleep(0.2)
        return plain(self, *arguments)
    loader.TokenData.gather = gather
"""
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


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES if name != "fsdp")])
def test_going_back_passes_over_the_samples(name: str, broken, tmp_path: Path) -> None:
    """rollback: from the last checkpoint on, with later samples; recorded in the metrics."""
    broken([8], INFINITE)
    recipe = {"nonfinite": "rollback", "checkpoint_seconds": 1e-6, "keep_checkpoints": 100}
    code, folder = run(small_config(tmp_path / "data", engine=ENGINES[name], train=recipe), tmp_path / "run")
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


def harm(config: Config, path: Path, what: Callable[[dict[int, psutil.Process]], object], rows: int = 10) -> RunFolder:
    """Start a run, do something to its ranks after so many rows, wait for its end."""
    create_run(config, path)
    folder = RunFolder(path)
    with open(tmp_log(folder), "wb") as log:
        process = subprocess.Popen(launch_command(config, path), env=launch_environment(config), start_new_session=True, stdout=log,
                                   stderr=log)  # fmt: skip
    try:
        before = len(folder.read_metrics())
        while len(folder.read_metrics()) < before + rows:
            assert process.poll() is None, tmp_log(folder).read_text()[-3000:]
            time.sleep(0.05)
        below = psutil.Process(process.pid)
        ranks = [child for child in (below, *below.children(recursive=True)) if "var_scale.train.worker" in child.cmdline()]
        what({int(rank.environ().get("RANK", 0)): rank for rank in ranks if "torch.distributed.run" not in rank.cmdline()})
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return folder


def tmp_log(folder: RunFolder) -> Path:
    """What a run's processes print."""
    return folder.path.parent / f"{folder.path.name}.log"


@pytest.mark.slow
def test_a_silent_rank_is_named(tmp_path: Path) -> None:
    """Rank 1 is stopped by the system: it cannot say anything any more."""
    config = small_config(tmp_path / "data", engine=DDP, train={"steps": 10000, "hang_seconds": 8})
    status = harm(config, tmp_path / "run", lambda ranks: ranks[1].send_signal(signal.SIGSTOP)).status()
    assert status["state"] == "failed" and "rank 1 does not answer, last heard of" in status["reason"], status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_a_signal_to_one_rank_stops_all_within_seconds(name: str, broken, tmp_path: Path) -> None:
    """SIGUSR1 to rank 1, long before the next row is due: all ranks save and leave; continued, the run ends with the same bits."""
    config = small_config(tmp_path / "data", engine=ENGINES[name], train={"steps": 200}, log={"every": 40})
    broken(range(9999), "time.sleep(0.1)")  # a row each 4 seconds
    folder = harm(config, tmp_path / "run", lambda ranks: ranks[1].send_signal(signal.SIGUSR1), rows=1)
    status = folder.status()
    assert status["state"] == "preempted" and status["reason"].startswith("another rank was asked to stop (saved"), status
    assert 40 < status["step"] < 80 and checkpoints(folder.checkpoints)[-1].step == status["step"]
    broken([], "pass")
    code, folder = run(config, tmp_path / "run")
    assert code == 0
    other, whole = run(config, tmp_path / "whole")
    assert other == 0 and checkpoints(folder.checkpoints)[-1].state["files"] == checkpoints(whole.checkpoints)[-1].state["files"]


@pytest.mark.parametrize("name", ["zero2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_ranks_do_not_outlive_their_launcher(name: str, tmp_path: Path) -> None:
    """The command that was typed is killed; DeepSpeed's has one more launcher between it and the ranks."""
    config = small_config(tmp_path / "data", engine=ENGINES[name], train={"steps": 100000})

    def kill(ranks: dict[int, psutil.Process]) -> None:
        above = ranks[0].parents()
        next(p for p in above if {"deepspeed.launcher.runner", "torch.distributed.run"} & set(p.cmdline())).kill()

    folder, deadline = harm(config, tmp_path / "run", kill), time.monotonic() + 30
    while folder.status()["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert folder.status()["state"] == "preempted", folder.status()


@pytest.mark.parametrize(("training", "call"), [(True, 10), (False, 2)])
def test_a_stop_puts_an_evaluation_off(training: bool, call: int, broken, tmp_path: Path) -> None:
    """Asked to stop in the step before an evaluation, or in the middle of it: the next life makes it, once, and ends with the same bits."""
    config = small_config(tmp_path / "data", train={"evals": 2, "eval_batch": 10}, log={"every": 5})
    broken([call], "import signal; os.kill(os.getpid(), signal.SIGUSR1)", rank=0, training=training)
    code, folder = run(config, tmp_path / "run")
    assert code == EXIT_REQUEUE and folder.status()["reason"].startswith("SIGUSR1"), folder.status()
    assert [row["kind"] for row in folder.read_metrics()] == ["train", "train"]
    assert checkpoints(folder.checkpoints)[-1].state["evaluation_owed"]
    broken([], "pass", rank=9)
    for path in ("run", "whole"):
        code, folder = run(config, tmp_path / path)
        assert code == 0
    runs = RunFolder(tmp_path / "run"), folder
    rows = [[row for row in one.read_metrics() if row["kind"] == "eval"] for one in runs]
    for one, two in zip(*rows, strict=True):
        assert (one["step"], one["loss_avg"]) == (two["step"], two["loss_avg"])
    assert [row["step"] for row in rows[0]] == [10, 20]
    assert checkpoints(runs[0].checkpoints)[-1].state["files"] == checkpoints(runs[1].checkpoints)[-1].state["files"]


def test_a_rank_slow_at_its_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 reads from a slow disk."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, folder = run(small_config(tmp_path / "data", engine=DDP, log={"every": 5}), tmp_path / "run")
    assert code == 0
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row["slowest_rank"] for row in rows] == [1] * 4 and rows[-1]["data_seconds"] > 0.1
    assert "rank 1 waits for data" in (folder.log / "launch.log").read_text()


def test_a_shard_that_breaks_is_named(tmp_path: Path) -> None:
    """A shard is cut while the run reads it: the reader's thread dies, the run ends with the shard's name."""
    config = small_config(tmp_path / "data", engine=DDP, train={"steps": 100000})
    shard = sorted((tmp_path / "data" / "train").glob("*.tar"))[1]
    status = harm(config, tmp_path / "run", lambda ranks: os.truncate(shard, 2000)).status()
    assert status["state"] == "failed" and f"{shard}: ends before byte" in status["reason"], status


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The system refuses to write more to a file than half a checkpoint: one line, the older checkpoint stays, the run goes on from it."""
    recipe = {"steps": 500, "checkpoint_seconds": 1e-6}
    config, path = small_config(tmp_path / "data", train=recipe, log={"every": 20}), tmp_path / "run"

    def refuse(ranks: dict[int, psutil.Process]) -> None:
        half = max(path.glob("checkpoints/step-*/*.safetensors")).stat().st_size // 2
        ranks[0].rlimit(psutil.RLIMIT_FSIZE, (half, half))

    folder = harm(config, path, refuse, rows=3)
    status = folder.status()
    assert status["state"] == "failed" and "the disk is full; free some space" in status["reason"], status
    assert "Traceback" not in tmp_log(folder).read_text() and not list(folder.checkpoints.glob(".*"))
    last = checkpoints(folder.checkpoints)[-1]
    assert last.step < 500 and last.verify(0, 1) == ""
    code, folder = run(config, path)
    assert code == 0 and folder.status()["restarts"] == 1


def test_a_spike_is_recorded(broken, tmp_path: Path) -> None:
    """A loss far out of its history."""
    broken([30], "out = (out[0] * 20, *out[1:])", rank=0)
    code, folder = run(small_config(tmp_path / "data", train={"steps": 40}), tmp_path / "run")
    assert code == 0
    spikes = [row for row in folder.read_metrics() if row["kind"] == "spike"]
    assert (30, "loss") in [(row["step"], row["what"]) for row in spikes] and all(row["step"] >= 30 for row in spikes)
    assert "warning: step 30: loss" in (folder.log / "launch.log").read_text()


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
