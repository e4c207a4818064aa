"""Config files: presets, overrides, the identity of a run, and messages about mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.raises import raises
from var_scale.config.load import (
    config_hash,
    config_root,
    dump,
    load,
    run_config,
    write_config,
)
from var_scale.errors import UserError

PRESETS = sorted(
    str(p.relative_to(config_root()).with_suffix("")) for p in config_root().rglob("*.yaml")
)


@pytest.mark.parametrize("name", [p for p in PRESETS if p.startswith(("model/", "study/"))])
def test_every_preset_loads(name: str) -> None:
    """Presets that are complete configs are valid."""
    assert load(name).train.batch_size > 0


def test_the_home_folder_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder in every path that a config, its includes or an override names; a
    URL stays."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("include: [model/d16]\ndata: {tokens_val: ~/val}\n")
    (tmp_path / "zero.json").write_text('{"steps_per_print": 7}')
    (tmp_path / "run.yaml").write_text("include: ~/base.yaml\ntokenizer: {weights: ~/vae.pth}\n")
    keys = ("data.images_train", "data.images_val", "data.tokens_train", "data.cache")
    more = ("tokenizer.train.vgg_weights", "tokenizer.train.lpips_weights", "cluster.python")
    given = [f"{key}=~/{key}" for key in (*keys, *more)]
    config = load("~/run.yaml", [*given, "engine.name=deepspeed", "engine.deepspeed=~/zero.json"])
    values = dump(config)
    for key in (*keys, *more):
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        assert place[name] == f"{tmp_path}/{key}"
    assert config.data.tokens_val == f"{tmp_path}/val"
    assert config.tokenizer.weights == f"{tmp_path}/vae.pth"
    assert config.engine.deepspeed == {"steps_per_print": 7}
    url = load("model/d16", ["data.tokens_val=http://host/~user/val"]).data.tokens_val
    assert url == "http://host/~user/val"


def test_every_even_depth_has_a_preset() -> None:
    """Presets exist for d6 to d36 and for the 512-pixel model."""
    assert {f"model/d{d}" for d in range(6, 37, 2)} | {"model/d36-512"} <= set(PRESETS)


@pytest.mark.parametrize(
    ("depth", "epochs", "batch", "lr", "end", "gamma", "wd_end"),
    [
        ("16", 200, 768, 1e-4, 0.1, 1e-3, None),
        ("20", 250, 768, 1e-4, 0.1, 1e-3, None),
        ("24", 350, 768, 8e-5, 0.01, 1e-4, None),
        ("30", 350, 1024, 8e-5, 0.01, 1e-5, 0.08),
        ("36-512", 350, 768, 8e-5, 0.01, 5e-6, 0.08),
    ],
)
def test_official_recipes(
    depth: str, epochs: float, batch: int, lr: float, end: float, gamma: float, wd_end: float | None
) -> None:
    """The presets have the values of the published commands."""
    c = load(f"model/d{depth}")
    assert (c.train.epochs, c.train.batch_size, c.train.base_lr, c.train.lr_end) == (
        epochs,
        batch,
        lr,
        end,
    )
    assert (c.model.init_adaln_gamma, c.train.weight_decay_end) == (gamma, wd_end)
    assert c.model.shared_aln == (depth == "36-512")


def test_override_and_engine_preset() -> None:
    """`engine=fsdp` replaces the whole section; a dotted key changes one value."""
    c = load("study/tiny", ["train.batch_size=32", "engine=fsdp"])
    assert (c.train.batch_size, c.engine.name, c.engine.deepspeed) == (32, "fsdp", {})


@pytest.mark.parametrize(
    ("override", "code", "names"),
    [
        ("train.batchsize=3", "config.unknown-key", ("train.batchsize", "batch_size")),
        ("trane.lr=1", "config.unknown-key", ("trane", "train")),
        ("model.depth=two", "config.value", ("model.depth", "two")),
        ("train.epochs=10", "config.value", ("train", "epochs", "steps")),
        ("model.heads=7", "config.value", ("model", "7 heads")),
        ("study.seeds=[]", "config.value", ("study.seeds",)),
        ("study.depths=[2,2]", "config.value", ("study", "depths [2, 2]")),
        ("study.grid={model.depth: [1]}", "config.value", ("grid.model.depth",)),
        ("study.budget_hours=1", "config.value", ("budget_hours", "study.device")),
        ("train.accumulate=3", "config.value", ("train", "16", "3")),
        ("tokenizer.patch_nums=[3,2]", "config.value", ("tokenizer", "patch_nums")),
        ("tokenizer.patch_nums=[]", "config.value", ("tokenizer.patch_nums",)),
        ("train.adam_betas=[0.9,2]", "config.value", ("train.adam_betas",)),
        ("train.base_lr=.inf", "config.value", ("train.base_lr",)),
        ("train.scale_weights=[1,2]", "config.value", ("train.scale_weights", "2", "4")),
        ("data.num_classes=7", "config.value", ("data.num_classes", "7", "10")),
        ("x", "config.override", ("key=value",)),
        ("engine=zero9", "config.not-found", ("engine/zero9", "engine/zero")),
    ],
)
def test_a_wrong_override_is_named(override: str, code: str, names: tuple[str, ...]) -> None:
    """The message is one line with the key, the value and the nearest valid name."""
    with raises(code, *names):
        load("study/tiny", [override])


def test_a_warmup_that_is_longer_than_the_training() -> None:
    with raises("config.value", "warmup_epochs 100"):
        load("model/d16", ["train.warmup_epochs=1000"])


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (b"a: [1\n", "config.not-yaml", ("line",)),
        (b"- 1\n", "config.not-yaml", ("list",)),
        (b"\xff\xfe\x00binary", "config.not-yaml", ("UTF-8",)),
        (b"name: a\nname: b\n", "config.not-yaml", ("line 2", "key name")),
        (b"include: mine\n", "config.include-cycle", ()),
        (b"include: study/tiny\ntrain.batch_size: 32\n", "config.unknown-key", ("batch_size",)),
        (b"include: study/tini\n", "config.not-found", ("study/tini", "study/tiny")),
    ],
)
def test_a_broken_file_is_named(
    content: bytes, code: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Files that are not YAML, that include themselves or files that do not exist."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert error.value.code == code and all(name in str(error.value) for name in names)
    assert code == "config.not-found" or str(path) in str(error.value)


def test_deepspeed_json(tmp_path: Path) -> None:
    """A DeepSpeed file beside the config or as a preset; `auto` leaves a key to the recipe."""
    (tmp_path / "mine.json").write_text(
        '{"zero_optimization": {"stage": 2, "overlap_comm": true}, "train_batch_size": "auto", '
        '"bf16": {"enabled": "auto"}}'
    )
    (tmp_path / "c.yaml").write_text(
        "include: study/tiny\nengine: {name: deepspeed, deepspeed: mine.json}\n"
    )
    assert load(str(tmp_path / "c.yaml")).engine.deepspeed["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
    }
    assert set(load(str(tmp_path / "c.yaml")).engine.deepspeed) == {"zero_optimization"}
    assert (
        load("study/tiny", ["engine=zero1", "engine.deepspeed=engine/zero3.json"]).engine.zero_stage
        == 3
    )
    with pytest.raises(UserError, match=r"engine/zero9\.json") as error:
        load("study/tiny", ["engine.deepspeed=engine/zero9.json"])
    assert error.value.code == "config.deepspeed-json"
    for broken in ("{", "[]"):
        (tmp_path / "mine.json").write_text(broken)
        with pytest.raises(UserError, match=r"mine\.json") as error:
            load(str(tmp_path / "c.yaml"))
        assert error.value.code == "config.deepspeed-json"


def test_overrides_win_over_the_preset_of_a_size() -> None:
    """Keys given on the command line replace those of a size's preset; other keys stay."""
    config = load("study/var_paper", ["train.batch_size=1536", "model.attn_l2_norm=false"])
    for depth, lr in ((16, 1e-4), (30, 8e-5)):
        run = run_config(config, depth, 0)
        assert (
            run.train.batch_size,
            run.train.base_lr,
            run.model.attn_l2_norm,
            run.model.depth,
        ) == (1536, lr, False, depth)


def test_saved_config_is_the_same_run(tmp_path: Path) -> None:
    """Saving and loading keeps the hash; the engine does not change it, the learning rate does."""
    study = load("study/tiny")
    c = run_config(study, 3, 1)
    assert (c.model.depth, c.train.seed, c.study) == (3, 1, None)
    write_config(c, tmp_path / "c.yaml")
    assert config_hash(load(str(tmp_path / "c.yaml"))) == config_hash(c)
    assert config_hash(load(str(tmp_path / "c.yaml"), ["engine=ddp"])) == config_hash(c)
    assert config_hash(load(str(tmp_path / "c.yaml"), ["train.base_lr=0.1"])) != config_hash(c)


# Existing run folders hold these hashes: a change of the schema must not change them.
HASHES = [
    ("model/d16", None, "187562b52da2f5de5a5083acaa667082d0c3f1b4a7c41328424e6a110b032143"),
    ("model/d36-512", None, "fa0c0f999464af5a7bce845f8c37fb368b77de6574c24e544441f418083d551e"),
    ("study/tiny", None, "0dabffe8c442b61bb8824d6e63688bea70f7abfea3a2f3752736f48a72deccbf"),
    ("study/isoflop", None, "b8afa2ba8353d878dfdd2366710ec03bcbb8ea8f662ad602fd33de593e8b02b5"),
    ("study/var_paper", None, "e40ae9a2ab7920c65f37e337cd6832b593ceb2ee5371f20685259727f05bcae1"),
    ("study/tiny", 5, "e32c3a684b7780a8edd2b928bd8343f46e38d79475e6f7e36c476c392eed697a"),
    ("study/var_paper", 30, "1f525265c6ff803742319bc393b64394f387863cc7cd9ac3d6a307d598798627"),
]


@pytest.mark.parametrize(("name", "depth", "value"), HASHES)
def test_hashes_of_presets_stay(name: str, depth: int | None, value: str) -> None:
    """The identity of a run does not depend on the version of var-scale."""
    config = load(name)
    assert config_hash(run_config(config, depth, 1) if depth else config) == value


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("log.every=3", True),
        ("cluster.nodes=2", True),
        ("engine=hsdp8", True),
        ("train.keep_at=[0.5]", True),
        ("train.accumulate=2", True),
        ("tokenizer.weights=other.pth", True),
        ("tokenizer.train.vgg_weights=vgg.pth", True),
        ("data.images_train=elsewhere", True),
        ("data.shapes.seed=3", False),
        ("data.views=2", False),
        ("tokenizer.train.steps=3", False),
        ("train.evals=5", False),
        ("model.attention=sdpa", False),
    ],
)
def test_which_keys_identify_a_run(override: str, same: bool) -> None:
    """Where files lie, logging and the division of work do not change the identity of a run."""
    changed = config_hash(load("study/tiny", [override]))
    assert (changed == config_hash(load("study/tiny"))) == same


@pytest.mark.parametrize("given", ["3", "[d16, 4]", "{a: b}", "['']"])
def test_an_include_that_names_no_file(given: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"include: {given}\n")
    with raises("config.value", path, "include"):
        load(str(path))


def test_texts_that_look_like_numbers(tmp_path: Path) -> None:
    """A number where a text is needed is that text. An empty include includes nothing. The file may
    begin with a byte order mark."""
    path = tmp_path / "c.yaml"
    text = "include:\nname: 2024\ncluster: {account: 12345, memory: 0}\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + yaml.safe_dump(minimal()).encode())
    config = load(str(path))
    assert (config.name, config.cluster.account, config.cluster.memory) == ("2024", "12345", "0")


def minimal() -> dict[str, Any]:
    """The sections without which there is no config."""
    tree = dump(load("model/d16"))
    return {key: tree[key] for key in ("train", "tokenizer", "model")}


def test_values_of_a_grid_that_are_one_value() -> None:
    with raises("config.value", "train.base_lr"):
        load("study/tiny", ["study.grid={train.base_lr: [1e-2, 0.01]}"])


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_validation_data_are_not_the_training_data(kind: str) -> None:
    with raises("config.value", f"data.{kind}_val", "shards"):
        load("model/d16", [f"data.{kind}_train=my/shards", f"data.{kind}_val=my//shards/"])


def test_texts_stay_as_they_are_written(tmp_path: Path) -> None:
    """YAML 1.1 reads 0755 as 493, 12:30:00 as 45000, 1_0 as 10, and no as false; 1.10 would lose
    its zero. Numbers stay numbers, and switches may be written in any of these ways."""
    (tmp_path / "c.yaml").write_text(
        "include: [study/tiny]\nname: 0123\n"
        "cluster: {account: 0755, time: 12:30:00, memory: 1_0, qos: no, constraint: 1.10,\n"
        "  env: {A: 012, B: yes, C: 1:30, D: 1.10}}\n"
        "train: {base_lr: 1.0e-2, clip: 2.0, steps: 10, epochs: null}\n"
        "log: {tensorboard: off}\n"
    )
    config = load(str(tmp_path / "c.yaml"), ["cluster.partition=007", "train.ema=1e-1"])
    c = config.cluster
    assert (config.name, c.account, c.time, c.memory) == ("0123", "0755", "12:30:00", "1_0")
    assert (c.qos, c.constraint, c.partition) == ("no", "1.10", "007")
    assert c.env == {"A": "012", "B": "yes", "C": "1:30", "D": "1.10"}
    assert (config.train.base_lr, config.train.clip, config.train.steps) == (0.01, 2.0, 10)
    assert config.train.ema == 0.1 and config.log.tensorboard is False
    write_config(config, tmp_path / "again.yaml")
    assert load(str(tmp_path / "again.yaml")) == config


def test_what_is_given_twice() -> None:
    """On the command line as in a file."""
    with raises("config.override", "train.base_lr", "twice"):
        load("study/tiny", ["study.grid={train.base_lr: [0.02], train.base_lr: [0.01]}"])
    with raises("config.value", "flops"):
        load("study/tiny", ["study.flops=[1e12,1.0e12]"])


def test_null_empties_an_inherited_map() -> None:
    """A map of an included file is extended by another one; null removes all of its entries."""
    more = load("study/tiny", ["study.depth_seeds={9: [7]}"]).study
    assert more is not None and set(more.depth_seeds) == {1, 2, 3, 9}
    none = load("study/tiny", ["study.depth_seeds=null", "study.overrides=null"]).study
    assert none is not None and none.depth_seeds == {} == none.overrides
