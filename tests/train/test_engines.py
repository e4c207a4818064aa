"""Every engine trains the same model to the same losses, on two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.raises import raises
from tests.ranks import Ranks
from tests.runs import ENGINES, final, launch_log, losses, run, run_here, small_config
from var_scale.files import read_json
from var_scale.train.engine.deepspeed_config import engine_config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict]:
    """Twenty steps of the single engine, two micro-batches per step."""
    root = tmp_path_factory.mktemp("single")
    code, folder = run_here(small_config(root, train={"accumulate": 2}), root / "run")
    assert code == 0, launch_log(folder)[-3000:]
    return root, losses(folder), final(folder)


@pytest.mark.parametrize("name", ENGINES)
def test_same_losses(
    name: str, reference: tuple[Path, list[float], dict], ranks: Ranks, tmp_path: Path
) -> None:
    """Twenty float32 steps: losses and final evaluation agree within 1e-5 relative with the single
    engine."""
    root, want, want_final = reference
    config = small_config(root, train={"accumulate": 2}, engine=ENGINES[name])
    code, folder = ranks.run(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    got = losses(folder)
    assert len(got) == 20 and got[-1] < got[0] - 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(
        final(folder)["loss_per_scale"], want_final["loss_per_scale"], rtol=1e-5
    )
    assert final(folder)["samples"] == 37
    choices = read_json(folder.env)["choices"]
    assert (choices["engine"], choices["zero_stage"]) == (
        ENGINES[name]["name"],
        ENGINES[name].get("deepspeed", {}).get("zero_optimization", {}).get("stage"),
    )


@pytest.mark.slow
def test_no_compiler_is_needed(
    reference: tuple[Path, list[float], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deepspeed` launches a run where neither a compiler nor ninja exists: nothing is built."""
    root, want, _ = reference
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    config = small_config(root, train={"accumulate": 2}, engine=ENGINES["zero1"])
    code, folder = run(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    np.testing.assert_allclose(losses(folder), want, rtol=1e-5)
    assert not (tmp_path / "extensions").exists()


def test_conflicting_deepspeed_keys_are_refused() -> None:
    """Keys that the recipe decides cannot have another value."""
    assert engine_config({}, 2, 8, 2, 2.0)["train_micro_batch_size_per_gpu"] == 2
    wrong = [
        ({"train_batch_size": 4}, "train_batch_size"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"optimizer": {}}, "optimizer"),
    ]
    for given, key in wrong:
        with raises("train.deepspeed-key", key):
            engine_config(given, 2, 8, 2, 2.0)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks whose Triton kernels run in the interpreter, which a process decides once."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        environment.setenv("VAR_KERNELS_INTERPRET", "1")
        group = Ranks(2, tmp_path_factory.mktemp("interpreted"))
        yield group
        group.close()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero3", marks=pytest.mark.slow),
        pytest.param("ddp", marks=pytest.mark.nightly),
        pytest.param("fsdp", marks=pytest.mark.nightly),
        pytest.param("single", marks=pytest.mark.slow),
    ],
)
def test_fused_operators_on_engines(name: str, interpreted: Ranks, tmp_path: Path) -> None:
    """Every Triton kernel inside real training, in the interpreter: the same losses as plain
    PyTorch, and sharded weights are gathered where a fused operator reads them."""
    steps = {"steps": 2, "batch_size": 4, "base_lr": 0.3}
    plain_config = small_config(tmp_path, train=steps, model={"kernels": "off"})
    code, plain = run_here(plain_config, tmp_path / "plain")
    assert code == 0, launch_log(plain)[-3000:]
    config = small_config(tmp_path, train=steps, engine=ENGINES.get(name, {"name": "single"}))
    train = run if name == "single" else interpreted.run
    code, folder = train(config, tmp_path / "fused")
    assert code == 0, launch_log(folder)[-3000:]
    choices = read_json(folder.env)["choices"]
    assert choices["attention"].startswith("triton") and choices["kernels"].startswith("on")
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-5)
    np.testing.assert_allclose(
        final(folder)["loss_per_scale"], final(plain)["loss_per_scale"], rtol=1e-5
    )
