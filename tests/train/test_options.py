"""Precision, compilation, memory savings and the bench, on real processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.raises import raises
from tests.ranks import Ranks
from tests.runs import final, launch_log, losses, run, run_here, small_config
from var_scale.bench.train import bench_official, bench_train, show_dry_run
from var_scale.bench.train_worker import measure
from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.train.assemble import untrained
from var_scale.train.dry_run import dry_run
from var_scale.train.world import World

ENGINES = {
    "single": {"name": "single"},
    "fsdp": {"name": "fsdp", "processes": 2},
    "zero2-offload": {
        "name": "deepspeed",
        "processes": 2,
        "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    },
    "zero3": {
        "name": "deepspeed",
        "processes": 2,
        "deepspeed": {"zero_optimization": {"stage": 3}},
    },
}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Twenty float32 steps in two micro-batches."""
    root = tmp_path_factory.mktemp("plain")
    code, folder = run_here(small_config(root, train={"accumulate": 2}), root / "run")
    assert code == 0
    return root, losses(folder)


@pytest.mark.parametrize(
    "name", ["single", *(pytest.param(n, marks=slow) for n in ENGINES if n != "single")]
)
def test_float16(name: str, plain: tuple[Path, list[float]], ranks: Ranks, tmp_path: Path) -> None:
    """With loss scaling, accumulation and clipping the losses are close to float32; the metrics
    contain the scale."""
    root, _ = plain
    config = small_config(
        root, train={"accumulate": 2, "precision": "fp16", "clip": 0.5}, engine=ENGINES[name]
    )
    code, folder = (run_here if name == "single" else ranks.run)(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    recipe = {"accumulate": 2, "clip": 0.5}
    _, exact = run_here(small_config(root, train=recipe), tmp_path / "exact")
    np.testing.assert_allclose(losses(folder), losses(exact), rtol=2e-3)
    rows = [row for row in folder.read_metrics() if row["kind"] == "train"]
    assert {row["loss_scale"] for row in rows} == {2.0**11}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("single", {"recompute": "mlp", "recompute_every": 2}),
        pytest.param("fsdp", {"recompute": "mlp"}, marks=slow),
        pytest.param("zero3", {"recompute": "block"}, marks=slow),
        pytest.param("zero2-offload", {}, marks=slow),
        pytest.param("fsdp", {"compile": True}, marks=pytest.mark.nightly),
        pytest.param("single", {"compile": True}, marks=slow),
    ],
)
def test_what_saves_memory_or_time_changes_nothing(
    name: str, more: dict, plain: tuple[Path, list[float]], ranks: Ranks, tmp_path: Path
) -> None:
    """The float32 losses agree within 1e-5. Compiled runs are launched, because they change their
    process."""
    root, want = plain
    config = small_config(root, train={"accumulate": 2}, engine={**ENGINES[name], **more})
    train = run if "compile" in more else run_here if name == "single" else ranks.run
    code, folder = train(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    np.testing.assert_allclose(losses(folder), want, rtol=1e-5)
    assert final(folder)["samples"] == 37


@pytest.mark.slow
def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two real processes the bench reports the step, where its time goes, and a trace of it."""
    config = small_config(tmp_path, engine=ENGINES["fsdp"])
    result = bench_train(
        config, steps=3, warmup=1, out=tmp_path / "r.json", trace=tmp_path / "t.json", save=True
    )
    assert set(result["phases_ms"]) == {"data", "forward", "backward", "optimiser"}
    assert all(ms > 0 for ms in result["phases_ms"].values()) and result["exchange_ms"] > 0
    assert result["data"] == "token shards" and result["world"] == 2
    traced = Counter(event["name"] for event in traced_events(tmp_path / "t.json"))
    assert result["images_per_second"] == pytest.approx(8 / result["step_ms"] * 1e3)
    spent = [one["ms"] for one in result["top"]]
    assert len(spent) == 30 and spent == sorted(spent, reverse=True) and sum(spent) > 0
    assert all(traced[one["name"]] == one["calls"] for one in result["top"]), traced
    assert result["in_a_row_ms"] > 0 and result["device_ms"] is None
    save = result["save"]
    assert save["steps_ms"] > 0 and 0 < save["stall_ms"] < 1e3 * save["seconds"]
    assert "exchanges between ranks" in capsys.readouterr().out
    with raises("bench.not-writable", "r.txt"):
        bench_train(config, 1, 1, tmp_path / "r.txt", None)


def traced_events(path: Path) -> list[dict[str, Any]]:
    """The operations of a trace, without its metadata and the arrows between them."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


@pytest.mark.slow
def test_an_error_of_a_rank_is_the_error_of_the_bench(tmp_path: Path) -> None:
    broken = small_config(tmp_path, engine={"name": "ddp", "processes": 3})
    with raises("data.batch-divide", 8, 3):
        bench_train(broken, 1, 1, None, None)


def test_the_bench_takes_the_steps_of_training(tmp_path: Path) -> None:
    """In progressive training the benchmark times the scales that training uses at that step."""
    recipe = {"progressive": 0.5, "progressive_start": 0, "steps": 100}
    config = small_config(tmp_path, train=recipe)
    job = {"steps": 1, "warmup": 1, "trace": False, "save": False}
    found = {}
    for at in (0.0, 1.0):
        stepper = untrained(config, World(0, 1, torch.device("cpu")))
        found[at] = measure(stepper, job | {"at": at}, tmp_path)
    tokens = {at: r["tokens_per_second"] / r["images_per_second"] for at, r in found.items()}
    assert tokens == {0.0: pytest.approx(1), 1.0: pytest.approx(14)}
    assert found[0.0]["stage"] == 0 and found[1.0]["stage"] == -1


def test_what_the_comparison_with_the_official_trainer_needs(tmp_path: Path) -> None:
    """The comparison needs a checkout, the official tokenizer and one process; an error of one line
    reports what the official code lacks."""
    config = load("model/d6", ["engine=single", "train.batch_size=1", "train.precision=fp32"])
    with raises("bench.not-official", tmp_path):
        bench_official(config, tmp_path, 1, 1, False, None)
    (tmp_path / "trainer.py").write_text("import a_missing_module\n")
    with raises("bench.official-config", "tokenizer.arch"):
        bench_official(small_config(tmp_path), tmp_path, 1, 1, False, None)
    with raises("bench.no-result", "models"):
        bench_official(config, tmp_path, 1, 1, False, None)


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A d16 as one rank of 64, in seconds: FSDP is built and holds its share; with HSDP the rank
    holds more."""

    def at(world: int, *overrides: str) -> tuple[Config, object]:
        config = load("model/d16", ["train.precision=bf16", *overrides])
        return config, dry_run(config, world)

    (_, whole), (_, fsdp), (config, hybrid) = (
        at(1, "train.batch_size=8"),
        at(64, "engine=fsdp"),
        at(64, "engine=hsdp8"),
    )
    assert whole.held == whole.parameters == 310283520
    assert (
        fsdp.parameters / 64 <= fsdp.held < 1.2 * fsdp.parameters / 64
        and hybrid.held == pytest.approx(whole.held / 8, rel=0.05)
    )
    assert (
        fsdp.micro_batch == 12
        and fsdp.memory.optimizer < hybrid.memory.optimizer < whole.memory.optimizer
    )
    show_dry_run(config, 64)
    assert "fits NVIDIA H100" in capsys.readouterr().out
    with raises("train.shard-divide", 8, 12):
        at(12, "engine=hsdp8")
