"""Every engine trains the same model to the same losses, with two real processes (contract 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runs import final, losses, run, small_config
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.train.engine.deepspeed import engine_config

ENGINES = {
    "ddp": {"name": "ddp", "processes": 2},
    "fsdp": {"name": "fsdp", "processes": 2},
    **{f"zero{z}": {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": z}}} for z in range(4)},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict]:
    """Twenty steps of the single engine, two micro-batches a step."""
    root = tmp_path_factory.mktemp("single")
    code, folder = run(small_config(root, train={"accumulate": 2}), root / "run")
    assert code == 0
    return root, losses(folder), final(folder)


@pytest.mark.parametrize("name", ENGINES)
def test_same_losses(name: str, reference: tuple[Path, list[float], dict], tmp_path: Path) -> None:
    """Twenty float32 steps, losses and final evaluation within 1e-5 relative of the single engine."""
    root, want, want_final = reference
    code, folder = run(small_config(root, train={"accumulate": 2}, engine=ENGINES[name]), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    got = losses(folder)
    assert len(got) == 20 and got[-1] < got[0] - 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(final(folder)["loss_per_scale"], want_final["loss_per_scale"], rtol=1e-5)
    assert final(folder)["samples"] == 37


def test_no_compiler_is_needed(reference: tuple[Path, list[float], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed runs where there is neither compiler nor ninja: nothing is built, and nothing is found to build with."""
    root, want, _ = reference
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    code, folder = run(small_config(root, train={"accumulate": 2}, engine=ENGINES["zero1"]), tmp_path / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    np.testing.assert_allclose(losses(folder), want, rtol=1e-5)
    assert not (tmp_path / "extensions").exists()


def test_conflicting_deepspeed_keys_are_refused() -> None:
    """Keys that the recipe decides cannot say something else."""
    assert engine_config({}, 2, 8, 2, 2.0)["train_micro_batch_size_per_gpu"] == 2
    wrong = [({"train_batch_size": 4}, "train_batch_size"), ({"bf16": {"enabled": True}}, "bf16"), ({"optimizer": {}}, "optimizer")]
    for given, key in wrong:
        with pytest.raises(UserError, match=key):
            engine_config(given, 2, 8, 2, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "ddp", "fsdp", "single"])
def test_fused_operators_on_engines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Triton kernel inside real training, in the interpreter: the same losses as plain PyTorch, and sharded weights are gathered
    where a fused operator reads them."""
    steps = {"steps": 2, "batch_size": 4, "base_lr": 0.3}
    code, plain = run(small_config(tmp_path, train=steps, model={"kernels": "off"}), tmp_path / "plain")
    assert code == 0
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VAR_KERNELS_INTERPRET", "1")
    config = small_config(tmp_path, train=steps, engine=ENGINES.get(name, {"name": "single"}))
    code, folder = run(config, tmp_path / "fused")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    env = read_json(folder.env)["choices"]
    assert env["attention"].startswith("triton") and env["kernels"].startswith("on"), env
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-5)
    np.testing.assert_allclose(final(folder)["loss_per_scale"], final(plain)["loss_per_scale"], rtol=1e-5)
