"""Precision, compilation, memory savings and the bench, on real processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.runs import final, losses, run, small_config
from var_scale.cluster.bench import bench_official, bench_train, fill, show_dry_run
from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.train.dry_run import dry_run

ENGINES = {
    "single": {"name": "single"},
    "fsdp": {"name": "fsdp", "processes": 2},
    "zero2-offload": {"name": "deepspeed", "processes": 2,
                      "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
    "zero3": {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": 3}}},
}  # fmt: skip
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Twenty float32 steps in two micro-batches."""
    root = tmp_path_factory.mktemp("plain")
    code, folder = run(small_config(root, train={"accumulate": 2}), root / "run")
    assert code == 0
    return root, losses(folder)


@pytest.mark.parametrize("name", ["single", *(pytest.param(n, marks=slow) for n in ENGINES if n != "single")])
def test_float16(name: str, plain: tuple[Path, list[float]], tmp_path: Path) -> None:
    """With loss scaling, accumulation and clipping: close to float32, and the scale is in the metrics and in the checkpoint."""
    root, _ = plain
    config = small_config(root, train={"accumulate": 2, "precision": "fp16", "clip": 0.5}, engine=ENGINES[name])
    code, folder = run(config, tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    exact = run(small_config(root, train={"accumulate": 2, "clip": 0.5}), tmp_path / "exact")[1]
    np.testing.assert_allclose(losses(folder), losses(exact), rtol=2e-3)
    assert {row["loss_scale"] for row in folder.read_metrics() if row["kind"] == "train"} == {2.0**11}


@pytest.mark.parametrize(("name", "more"), [("single", {"recompute": "mlp", "recompute_every": 2}),
                                            pytest.param("fsdp", {"recompute": "mlp"}, marks=slow),
                                            pytest.param("zero3", {"recompute": "block"}, marks=slow),
                                            pytest.param("zero2-offload", {}, marks=slow),
                                            pytest.param("fsdp", {"compile": True}, marks=slow),
                                            pytest.param("single", {"compile": True}, marks=slow)])  # fmt: skip
def test_what_saves_memory_or_time_changes_nothing(name: str, more: dict, plain: tuple[Path, list[float]], tmp_path: Path) -> None:
    """The same float32 losses within 1e-5."""
    root, want = plain
    code, folder = run(small_config(root, train={"accumulate": 2}, engine={**ENGINES[name], **more}), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    np.testing.assert_allclose(losses(folder), want, rtol=1e-5)
    assert final(folder)["samples"] == 37


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two real processes: the step, where its time goes, and a trace of it."""
    config = small_config(tmp_path, engine=ENGINES["fsdp"])
    result = bench_train(config, steps=3, warmup=1, out=tmp_path / "r.json", trace=tmp_path / "t.json")
    assert set(result["phases_ms"]) == {"data", "forward", "backward", "optimiser"} and result["exchange_ms"] > 0
    assert result["data"] == "token shards" and result["world"] == 2 and json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert result["images_per_second"] == pytest.approx(8 / result["step_ms"] * 1e3)
    assert "exchanges between ranks" in capsys.readouterr().out
    with pytest.raises(UserError, match="ends in"):
        bench_train(config, 1, 1, tmp_path / "r.txt", None)
    broken = small_config(tmp_path, engine={"name": "ddp", "processes": 3})
    with pytest.raises(UserError, match="does not divide into 3 processes"):
        bench_train(broken, 1, 1, None, None)


def test_what_the_comparison_with_the_official_trainer_needs(tmp_path: Path) -> None:
    """A checkout, the official tokenizer, one process; what its code lacks is said in one line."""
    config = load("model/d6", ["engine=single", "train.batch_size=1", "train.precision=fp32"])
    with pytest.raises(UserError, match="no trainer"):
        bench_official(config, tmp_path, 1, 1, False, None)
    (tmp_path / "trainer.py").write_text("import a_missing_module\n")
    with pytest.raises(UserError, match="needs the official tokenizer"):
        bench_official(small_config(tmp_path), tmp_path, 1, 1, False, None)
    with pytest.raises(UserError, match="cannot be imported"):
        bench_official(config, tmp_path, 1, 1, False, None)


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A d16 as one rank of 64, in seconds: FSDP is built, and holds its share; HSDP more of it."""
    def at(world: int, *overrides: str) -> tuple[Config, object]:
        config = load("model/d16", ["train.precision=bf16", *overrides])
        return config, dry_run(config, world)

    (_, whole), (_, fsdp), (config, hybrid) = at(1, "train.batch_size=8"), at(64, "engine=fsdp"), at(64, "engine=hsdp8")
    assert whole.held == whole.parameters == 310283520
    assert fsdp.parameters / 64 <= fsdp.held < 1.2 * fsdp.parameters / 64 and hybrid.held == pytest.approx(whole.held / 8, rel=0.05)
    assert fsdp.micro_batch == 12 and fsdp.memory.optimizer < hybrid.memory.optimizer < whole.memory.optimizer
    show_dry_run(config, 64)
    assert "fits NVIDIA H100" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not divide 12"):
        at(12, "engine=hsdp8")


def test_the_measured_table_is_current() -> None:
    """docs/training.md is what `python -m var_scale.cluster.bench` makes of bench/results."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "training.md").read_text()
    assert fill(page, root / "bench" / "results") == page
