"""Faults that occur in long runs, caused deliberately in real runs."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.ranks import Ranks
from tests.runs import (
    ENGINES,
    final,
    launch_log,
    losses,
    rewind,
    run,
    run_here,
    small_config,
)
from var_scale.config.schema import Config
from var_scale.jobs.local import launch_command, launch_environment
from var_scale.run_folder import EXIT_DIVERGED, EXIT_HUNG, EXIT_REQUEUE, RunFolder
from var_scale.train.checkpoint import checkpoints
from var_scale.train.create import create_run
from var_scale.train.fault import FAULT_ENV

DDP = ENGINES["ddp"]
SHARDED = ("fsdp", "zero0", "zero2", "zero3")


def fired(folder: RunFolder) -> list[tuple[int, str, str]]:
    """Rank, step and kind of the faults that fired."""
    lines = (folder.log / "faults.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["rank"], row["step"], row["kind"]) for row in rows]


def slow(*names: str) -> list[Any]:
    """Parameters of the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["ddp", *slow(*SHARDED)])
def test_a_step_that_is_not_finite_is_not_taken(
    name: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of one rank is infinite once: all ranks skip that step, and training continues
    as if the step had not happened."""
    monkeypatch.setenv(FAULT_ENV, "1:8:inf")
    config = small_config(tmp_path / "data", engine=ENGINES[name])
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    assert fired(folder) == [(1, "8", "inf")]
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows if row.get("skipped")] == [8]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


@pytest.mark.parametrize("name", ["single", *slow("zero1")])
def test_continuing_after_a_step_that_was_not_taken(
    name: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW counts the steps that it took: a run that is stopped and continued after a skipped step
    ends with the same bits. With one process the loss is not finite on any rank."""
    train = run_here if name == "single" else ranks.run
    engine = {"name": "single"} if name == "single" else ENGINES[name]
    recipe = {"keep_steps": [8], "ema": 0.9}
    config = small_config(tmp_path / "data", engine=engine, train=recipe)
    monkeypatch.setenv(FAULT_ENV, "*:4:inf" if name == "single" else "1:4:inf")
    code, whole = train(config, tmp_path / "whole")
    assert code == 0 and len(fired(whole)) == 1
    assert [row["step"] for row in whole.read_metrics() if row.get("skipped")] == [4]
    end = checkpoints(whole.checkpoints)[-1].state
    assert end["skipped_steps"] == 1
    monkeypatch.delenv(FAULT_ENV)
    rewind(whole, 8)
    code, again = train(config, tmp_path / "whole")
    assert code == 0 and checkpoints(again.checkpoints)[-1].state["files"] == end["files"]
    assert [c.step for c in checkpoints(again.checkpoints)] == [8, 20]


@pytest.mark.parametrize("name", ["fsdp", *slow("ddp", "zero0", "zero2", "zero3")])
def test_a_rollback_skips_the_samples(
    name: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `rollback`, training continues from the newest checkpoint with later samples, and
    records it."""
    monkeypatch.setenv(FAULT_ENV, "1:8:inf")
    recipe = {"nonfinite": "rollback", "checkpoint_seconds": 1e-6, "keep_checkpoints": 100}
    config = small_config(tmp_path / "data", engine=ENGINES[name], train=recipe)
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0 and fired(folder) == [(1, "8", "inf")], launch_log(folder)[-3000:]
    rows = folder.read_metrics()
    back = [row for row in rows if row["kind"] == "restart"]
    assert [(row["step"], row["from"], row["skipped_samples"]) for row in back] == [(7, 8, 1)]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
    monkeypatch.delenv(FAULT_ENV)
    other, plain = run_here(small_config(tmp_path / "data"), tmp_path / "plain")
    assert other == 0 and losses(plain)[:7] == pytest.approx(losses(folder)[:7], rel=1e-5)
    assert losses(plain)[7] != losses(folder)[7]


@pytest.mark.parametrize(
    ("recipe", "step", "faults"),
    [
        ({"nonfinite": "stop"}, 5, "1:5:inf"),
        ({"nonfinite_limit": 3}, 7, "1:5:inf,1:6:inf,1:7:inf,1:8:inf"),
    ],
)
def test_when_it_stops(
    recipe: dict[str, object],
    step: int,
    faults: str,
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`stop` stops at once; `skip` stops after a given number of such steps in a row."""
    monkeypatch.setenv(FAULT_ENV, faults)
    config = small_config(tmp_path / "data", engine=DDP, train=recipe)
    code, folder = ranks.run(config, tmp_path / "run")
    status = folder.status()
    assert code == EXIT_DIVERGED and status["state"] == "diverged", status
    assert status["cause"] == "nonfinite" and status["step"] == step
    assert (1, str(step), "inf") in fired(folder)


@pytest.mark.xdist_group("timed")
def test_a_hanging_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sleeps in its forward pass: the run ends without help, names the rank, and leaves the
    stack of every rank."""
    monkeypatch.setenv(FAULT_ENV, "1:5:sleep=1000")
    config = small_config(tmp_path / "data", engine=DDP, train={"hang_seconds": 8})
    code, folder = run(config, tmp_path / "run")
    status = folder.status()
    assert code == EXIT_HUNG and status["state"] == "failed" and status["cause"] == "hung", status
    assert "rank 1" in status["reason"] and "step 4" in status["reason"]
    assert fired(folder) == [(1, "5", "sleep")]
    assert "after_forward" in (folder.log / "hang-rank-1.txt").read_text()
    assert (folder.log / "hang-rank-0.txt").exists()


def harm(
    config: Config, path: Path, what: Callable[[dict[int, psutil.Process]], object], rows: int = 10
) -> RunFolder:
    """Start a run, do something to its ranks after the given number of rows, and wait for its
    end."""
    create_run(config, path)
    folder = RunFolder(path)
    with open(tmp_log(folder), "wb") as log:
        process = subprocess.Popen(
            launch_command(config, path),
            env=launch_environment(config),
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    try:
        before = len(folder.read_metrics())
        while len(folder.read_metrics()) < before + rows:
            assert process.poll() is None, tmp_log(folder).read_text()[-3000:]
            time.sleep(0.05)
        below = psutil.Process(process.pid)
        ranks = [
            child
            for child in (below, *below.children(recursive=True))
            if "var_scale.train.worker" in child.cmdline()
        ]
        what(
            {
                int(rank.environ().get("RANK", 0)): rank
                for rank in ranks
                if "torch.distributed.run" not in rank.cmdline()
            }
        )
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return folder


def tmp_log(folder: RunFolder) -> Path:
    """The output of a run's processes."""
    return folder.path.parent / f"{folder.path.name}.log"


@pytest.mark.slow
@pytest.mark.xdist_group("timed")
def test_a_silent_rank_is_named(tmp_path: Path) -> None:
    """The system stops rank 1, which can no longer report anything."""
    config = small_config(tmp_path / "data", engine=DDP, train={"steps": 10000, "hang_seconds": 8})
    folder = harm(config, tmp_path / "run", lambda ranks: ranks[1].send_signal(signal.SIGSTOP))
    status = folder.status()
    assert status["state"] == "failed" and status["cause"] == "hung", status
    assert "rank 1" in status["reason"]


@pytest.mark.slow
@pytest.mark.xdist_group("timed")
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_a_signal_to_one_rank_stops_all_within_seconds(
    name: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 to rank 1, long before the next row is due: all ranks save and leave, and the
    continued run ends with the same bits."""
    config = small_config(
        tmp_path / "data", engine=ENGINES[name], train={"steps": 100}, log={"every": 40}
    )
    monkeypatch.setenv(FAULT_ENV, "1:*:sleep=0.1")  # a row every 4 seconds
    folder = harm(
        config, tmp_path / "run", lambda ranks: ranks[1].send_signal(signal.SIGUSR1), rows=1
    )
    status = folder.status()
    assert status["state"] == "preempted" and status["cause"] == "stopped", status
    assert fired(folder) == [(1, "1", "sleep")]
    assert 40 < status["step"] < 80 and checkpoints(folder.checkpoints)[-1].step == status["step"]
    monkeypatch.delenv(FAULT_ENV)
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0
    other, whole = ranks.run(config, tmp_path / "whole")
    end, expected = (checkpoints(f.checkpoints)[-1].state["files"] for f in (folder, whole))
    assert other == 0 and end == expected


@pytest.mark.slow
@pytest.mark.xdist_group("timed")
@pytest.mark.parametrize("name", ["zero2", "ddp"])
def test_ranks_do_not_outlive_their_launcher(name: str, tmp_path: Path) -> None:
    """The command that the user typed is killed; with DeepSpeed one more launcher is between the
    command and the ranks."""
    config = small_config(tmp_path / "data", engine=ENGINES[name], train={"steps": 100000})

    def kill(ranks: dict[int, psutil.Process]) -> None:
        above = ranks[0].parents()
        next(
            p
            for p in above
            if {"deepspeed.launcher.launch", "torch.distributed.run"} & set(p.cmdline())
        ).kill()

    folder, deadline = harm(config, tmp_path / "run", kill), time.monotonic() + 30
    while folder.status()["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert folder.status()["state"] == "preempted", folder.status()


@pytest.mark.parametrize("step", ["10", "eval2"])
def test_a_stop_postpones_an_evaluation(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop is requested in the step before an evaluation, or in the middle of it: the next
    attempt evaluates, once, and the run ends with the same bits."""
    config = small_config(tmp_path / "data", train={"evals": 2, "eval_batch": 10}, log={"every": 5})
    monkeypatch.setenv(FAULT_ENV, f"0:{step}:usr1")
    code, folder = run_here(config, tmp_path / "run")
    status = folder.status()
    assert code == EXIT_REQUEUE and status["cause"] == "stopped", status
    assert "SIGUSR1" in status["reason"] and fired(folder) == [(0, step, "usr1")]
    assert [row["kind"] for row in folder.read_metrics()] == ["train", "train"]
    assert checkpoints(folder.checkpoints)[-1].state["evaluation_pending"]
    monkeypatch.delenv(FAULT_ENV)
    for path in ("run", "whole"):
        code, folder = run_here(config, tmp_path / path)
        assert code == 0
    both = RunFolder(tmp_path / "run"), folder
    rows = [[row for row in one.read_metrics() if row["kind"] == "eval"] for one in both]
    for one, two in zip(*rows, strict=True):
        assert (one["step"], one["loss_avg"]) == (two["step"], two["loss_avg"])
    assert [row["step"] for row in rows[0]] == [10, 20]
    end, expected = (checkpoints(f.checkpoints)[-1].state["files"] for f in both)
    assert end == expected


def test_a_rank_slow_at_its_data_is_named(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 reads from a slow disk."""
    monkeypatch.setenv(FAULT_ENV, "1:*:slow-data=0.2")
    config = small_config(tmp_path / "data", engine=DDP, log={"every": 5})
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0 and fired(folder) == [(1, "1", "slow-data")]
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row["slowest_rank"] for row in rows] == [1] * 4 and rows[-1]["data_seconds"] > 0.1
    assert "rank 1" in launch_log(folder)


@pytest.mark.parametrize("name", ["single", *slow("ddp")])
@pytest.mark.xdist_group("timed")
def test_a_shard_that_breaks_is_named(name: str, tmp_path: Path) -> None:
    """A shard is truncated while the run reads it: the run ends and names the shard."""
    engine = ENGINES.get(name, {"name": name})
    config = small_config(tmp_path / "data", engine=engine, train={"steps": 100000})
    shard = sorted((tmp_path / "data" / "train").glob("*.tar"))[1]
    if name == "single":
        folder = RunFolder(tmp_path / "run")

        def truncate() -> None:
            while len(folder.read_metrics()) < 10:
                time.sleep(0.02)
            os.truncate(shard, 2000)

        threading.Thread(target=truncate, daemon=True).start()
        run_here(config, folder.path)
    else:
        folder = harm(config, tmp_path / "run", lambda ranks: os.truncate(shard, 2000))
    status = folder.status()
    assert status["state"] == "failed" and str(shard) in status["reason"], status
    assert status["cause"].startswith("data."), status


@pytest.mark.xdist_group("timed")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The system refuses to write more than half a checkpoint to a file: the run ends with one
    line, the older checkpoint stays, and the run continues from it."""
    recipe = {"steps": 200, "checkpoint_seconds": 1e-6}
    config = small_config(tmp_path / "data", train=recipe, log={"every": 10})
    path = tmp_path / "run"

    def refuse(ranks: dict[int, psutil.Process]) -> None:
        half = max(path.glob("checkpoints/step-*/*.safetensors")).stat().st_size // 2
        ranks[0].rlimit(psutil.RLIMIT_FSIZE, (half, half))

    folder = harm(config, path, refuse, rows=3)
    status = folder.status()
    assert status["state"] == "failed" and status["cause"] == "file.disk-full", status
    assert "Traceback" not in tmp_log(folder).read_text()
    assert not list(folder.checkpoints.glob(".*"))
    last = checkpoints(folder.checkpoints)[-1]
    assert last.step < 200 and last.verify(0, 1) == ""
    code, folder = run_here(config, path)
    assert code == 0 and folder.status()["restarts"] == 1


def test_a_spike_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is far outside of its history."""
    monkeypatch.setenv(FAULT_ENV, "0:30:scale=20")
    code, folder = run_here(small_config(tmp_path / "data", train={"steps": 40}), tmp_path / "run")
    assert code == 0 and fired(folder) == [(0, "30", "scale")]
    spikes = [row for row in folder.read_metrics() if row["kind"] == "spike"]
    assert (30, "loss") in [(row["step"], row["what"]) for row in spikes]
    assert all(row["step"] >= 30 for row in spikes)
    assert "step 30: loss" in launch_log(folder)


@pytest.mark.slow
def test_out_of_memory_is_one_line(tmp_path: Path) -> None:
    """The batch does not fit into memory: the message has the peak and what to change."""
    config = small_config(tmp_path, train={"batch_size": 8192 * 64, "steps": 1})
    folder = create_run(config, tmp_path / "run")
    limit = 4 << 30

    def small_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    process = subprocess.run(
        launch_command(config, tmp_path / "run"),
        env=launch_environment(config),
        preexec_fn=small_memory,
        capture_output=True,
        text=True,
        check=False,
    )
    status = folder.status()
    assert process.returncode != 0 and status["state"] == "failed", process.stderr[-2000:]
    assert status["cause"] == "out-of-memory" and "train.accumulate" in status["reason"], status
    assert "Traceback" not in process.stderr


def test_the_options_together_and_what_they_record(ranks: Ranks, tmp_path: Path) -> None:
    """Averaged weights, z-loss, weights of scales, progressive training and recomputation in one
    run, evaluated with both kinds of weights."""
    recipe = {
        "ema": 0.5,
        "z_loss": 1e-4,
        "scale_weights": "scale",
        "progressive": 0.5,
        "progressive_start": 0,
        "evals": 2,
    }
    engine = {**ENGINES["fsdp"], "recompute": "block", "reshard_after_forward": False}
    config = small_config(tmp_path / "data", train=recipe, engine=engine, log={"activations": True})
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert [row.get("stage") for row in rows][:2] == [0, 0] and rows[-1].get("stage") is None
    assert len(rows[0]["loss_per_scale"]) == 1 and len(rows[-1]["loss_per_scale"]) == 3
    assert rows[0]["tokens_per_second"] / rows[0]["images_per_second"] == pytest.approx(1)
    assert rows[-1]["memory_bytes"] > 1e8
    assert rows[-1]["step_seconds"] > rows[-1]["data_seconds"] >= 0
    largest, rms = rows[5]["activation_max"], rows[5]["activation_rms"]
    assert len(rms) == 2 and all(m > r > 0 for m, r in zip(largest, rms, strict=True))
    last = final(folder)
    assert last["ema_loss_avg"] != last["loss_avg"]
    assert last["ema_loss_avg"] == pytest.approx(last["loss_avg"], rel=0.2)
