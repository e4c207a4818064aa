"""Config files: presets, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from var_scale.config.load import config_hash, config_root, load, run_config, write_config
from var_scale.errors import UserError

PRESETS = sorted(str(p.relative_to(config_root()).with_suffix("")) for p in config_root().rglob("*.yaml"))


@pytest.mark.parametrize("name", [p for p in PRESETS if p.startswith(("model/", "study/"))])
def test_every_preset_loads(name: str) -> None:
    """Presets that stand alone are valid."""
    assert load(name).train.batch_size > 0


def test_every_even_depth_has_a_preset() -> None:
    """d6 to d36, and the 512-pixel model."""
    assert {f"model/d{d}" for d in range(6, 37, 2)} | {"model/d36-512"} <= set(PRESETS)


@pytest.mark.parametrize(
    ("depth", "epochs", "batch", "lr", "end", "gamma", "wd_end"),
    [("16", 200, 768, 1e-4, 0.1, 1e-3, None), ("20", 250, 768, 1e-4, 0.1, 1e-3, None), ("24", 350, 768, 8e-5, 0.01, 1e-4, None),
     ("30", 350, 1024, 8e-5, 0.01, 1e-5, 0.08), ("36-512", 350, 768, 8e-5, 0.01, 5e-6, 0.08)],
)  # fmt: skip
def test_official_recipes(depth: str, epochs: float, batch: int, lr: float, end: float, gamma: float, wd_end: float | None) -> None:
    """The published commands."""
    c = load(f"model/d{depth}")
    assert (c.train.epochs, c.train.batch_size, c.train.base_lr, c.train.lr_end) == (epochs, batch, lr, end)
    assert (c.model.init_adaln_gamma, c.train.weight_decay_end) == (gamma, wd_end)
    assert c.model.shared_aln == (depth == "36-512")


def test_override_and_engine_preset() -> None:
    """`engine=fsdp` takes the whole preset; a dotted key changes one value."""
    c = load("study/tiny", ["train.batch_size=32", "engine=fsdp"])
    assert (c.train.batch_size, c.engine.name, c.engine.deepspeed) == (32, "fsdp", {})


@pytest.mark.parametrize(
    ("override", "words"),
    [("train.batchsize=3", "train.batchsize; did you mean batch_size"), ("model.depth=two", "model.depth"), ("x", "key=value"),
     ("engine=zero9", "engine/zero9"), ("train.steps=10", "exactly one of epochs and steps"), ("model.heads=7", "does not divide"),
     ("study.seeds=[]", "study.seeds"),
     ("study.depths=[2,2]", "twice"),
     ("train.accumulate=3", "does not divide"), ("tokenizer.patch_nums=[3,2]", "rise"),
     ("trane.lr=1", "unknown key trane; did you mean train")],
)  # fmt: skip
def test_one_clear_line(override: str, words: str) -> None:
    """What, where, and the nearest right name."""
    with pytest.raises(UserError) as error:
        load("study/tiny", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_file_broken_yaml_and_circle(tmp_path: Path) -> None:
    """Files that cannot be read."""
    with pytest.raises(UserError, match="did you mean study/tiny"):
        load("study/tini")
    (tmp_path / "a.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("include: b\n")
    with pytest.raises(UserError, match="includes itself"):
        load(str(tmp_path / "b.yaml"))


def test_deepspeed_json(tmp_path: Path) -> None:
    """A DeepSpeed user's own file, beside the config or by preset; `auto` leaves a key to the recipe."""
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}, "train_batch_size": "auto", '
                                        '"bf16": {"enabled": "auto"}}')  # fmt: skip
    (tmp_path / "c.yaml").write_text("include: study/tiny\nengine: {name: deepspeed, deepspeed: mine.json}\n")
    assert load(str(tmp_path / "c.yaml")).engine.deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert set(load(str(tmp_path / "c.yaml")).engine.deepspeed) == {"zero_optimization"}
    assert load("study/tiny", ["engine=zero1", "engine.deepspeed=engine/zero3.json"]).engine.zero_stage == 3
    with pytest.raises(UserError, match="no such file; give a DeepSpeed JSON"):
        load("study/tiny", ["engine.deepspeed=engine/zero9.json"])
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(str(tmp_path / "c.yaml"))


def test_the_command_line_is_stronger_than_a_size_preset() -> None:
    """A size's preset gives way to what the person asked for, and only there."""
    config = load("study/var_paper", ["train.batch_size=1536", "model.attn_l2_norm=false"])
    for depth, lr in ((16, 1e-4), (30, 8e-5)):
        run = run_config(config, depth, 0)
        assert (run.train.batch_size, run.train.base_lr, run.model.attn_l2_norm, run.model.depth) == (1536, lr, False, depth)


def test_saved_config_is_the_same_run(tmp_path: Path) -> None:
    """Saving and loading keeps the hash; the engine does not change it, the learning rate does."""
    study = load("study/tiny")
    c = run_config(study, 3, 1)
    assert (c.model.depth, c.train.seed, c.study) == (3, 1, None)
    write_config(c, tmp_path / "c.yaml")
    assert config_hash(load(str(tmp_path / "c.yaml"))) == config_hash(c)
    assert config_hash(load(str(tmp_path / "c.yaml"), ["engine=ddp"])) == config_hash(c)
    assert config_hash(load(str(tmp_path / "c.yaml"), ["train.base_lr=0.1"])) != config_hash(c)


def test_config_reference_is_current() -> None:
    """docs/config.md is what the schema says."""
    from var_scale.config.reference import reference

    assert (Path(__file__).parents[2] / "docs" / "config.md").read_text() == reference()
