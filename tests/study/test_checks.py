"""Every precondition of a study and of a run, checked without starting anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.raises import raises
from tests.runs import small_config
from tests.study.mini import mini
from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.data.embedded import ShapesSettings, write_shapes
from var_scale.errors import UserError
from var_scale.locks import take_lock
from var_scale.study.checks import (
    check_run_here,
    check_study_here,
    check_study_on_slurm,
    only_process,
    require_matching_runs,
    require_untrained_tokenizer,
)
from var_scale.study.data_checks import require_known_samples, require_splits
from var_scale.study.manifests import with_manifests
from var_scale.study.run import run_study
from var_scale.study.stages import make_report
from var_scale.study.status import status_table
from var_scale.study.study import Study

TEACHER = "data.teacher={features: 8, train_samples: 64, val_samples: 16}"


@pytest.mark.parametrize(
    ("overrides", "code", "name"),
    [
        (["study.depths=[]"], "study.depths-missing", "study.depths"),
        (["data.images_train=x"], "study.sources-conflict", "data.images_*"),
        (["data.tokens_val=x"], "study.sources-conflict", "data.tokens_*"),
        ([TEACHER], "study.sources-conflict", "data.teacher"),
        (["study.rates=nothing"], "config.not-found", "study.rates=nothing"),
        (
            [TEACHER, "data.shapes=null", "tokenizer.vocab_size=1"],
            "study.teacher-vocabulary",
            "tokenizer.vocab_size",
        ),
        (
            [TEACHER, "data.shapes=null", "data.teacher.train_samples=15"],
            "study.too-few-samples",
            "15",
        ),
        (["data.shapes.train_images=15"], "study.too-few-samples", "15"),
        (["data.shapes.size=36"], "study.image-size", "data.shapes.size=32"),
        (["data.shapes=null"], "study.sources-missing", "data.images_train"),
        (["tokenizer.weights=none.pth"], "study.weights-missing", "none.pth"),
        (["engine=zero1", "engine.processes=3"], "study.batch-indivisible", "3 processes"),
        (["study.parallel=2", "engine=ddp"], "study.parallel-engine", "engine=single"),
        (["engine=fsdp", "engine.shard=3", "engine.processes=2"], "study.shard-groups", "3"),
    ],
)
def test_a_study_that_cannot_run_here_is_refused(
    overrides: list[str], code: str, name: str, tmp_path: Path
) -> None:
    """Nothing is written, not even the study's folder."""
    with raises(code, name):
        run_study(mini_config(tmp_path, overrides), tmp_path)
    assert not list(tmp_path.iterdir())


def mini_config(runs: Path, overrides: list[str]) -> Config:
    return mini(runs, *overrides).config


@pytest.mark.parametrize(
    ("overrides", "code", "name"),
    [
        (["cluster.tasks_per_node=3"], "study.batch-indivisible", "6 processes"),
        (["engine=single"], "study.launcher-unfit", "engine=zero1"),
        (
            ["engine=single", "cluster.nodes=1", "cluster.launcher=pdsh"],
            "study.launcher-unfit",
            "cluster.launcher=srun",
        ),
        (
            ["engine=zero1", "cluster.launcher=slurm", "cluster.container=env"],
            "study.launcher-unfit",
            "cluster.container",
        ),
        (["cluster.time=120"], "study.time-too-short", "cluster.time"),
        (["engine=fsdp", "engine.shard=3"], "study.shard-groups", "engine.shard"),
        (["data.shapes=null"], "study.sources-missing", "data.images_train"),
    ],
)
def test_a_study_that_cannot_run_on_slurm_is_refused(
    overrides: list[str], code: str, name: str, tmp_path: Path
) -> None:
    with raises(code, name):
        check_study_on_slurm(mini(tmp_path, "engine=ddp", "cluster=dev", *overrides))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("cluster.time=tomorrow", "cluster.time"),
        ("cluster.launcher=mpirun", "cluster.launcher"),
        ("cluster.env={1A: b}", "cluster.env"),
        ("study.budget_hours=1", "budget_hours"),
        ("study.grid={cluster.time: ['01:00:00']}", "cluster"),
    ],
)
def test_a_config_that_no_cluster_can_run_is_refused(
    overrides: str, key: str, tmp_path: Path
) -> None:
    with raises("config.value", key):
        mini(tmp_path, "engine=ddp", "cluster=dev", overrides)


def test_a_dry_run_needs_no_weights(tmp_path: Path) -> None:
    """Only a real submission looks for the file of the tokenizer."""
    study = mini(tmp_path, "engine=ddp", "cluster=dev", "tokenizer.weights=none.pth")
    check_study_on_slurm(study, dry_run=True)
    with raises("study.weights-missing"):
        check_study_on_slurm(study)


ZERO = {"name": "deepspeed", "processes": 2}


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"engine": {"name": "fsdp", "processes": 3}}, "study.batch-indivisible", ["8", "3"]),
        (
            {"engine": {"name": "fsdp", "processes": 2, "shard": 4}},
            "study.shard-groups",
            ["engine.shard", "2", "4"],
        ),
        ({"model": {"attention": "flex"}}, "model.attention", ["flex"]),
        ({"tokenizer": {"weights": None}}, "study.weights-missing", ["tokenizer.weights"]),
        ({"data": {"tokens_val": None}}, "study.shards-missing", ["data.tokens_val"]),
        ({"data": {"online": True}}, "study.shards-missing", ["data.images_train"]),
    ],
)
def test_a_run_that_cannot_begin_is_refused(
    changes: dict[str, Any], code: str, names: list[str], tmp_path: Path
) -> None:
    with raises(code, *names):
        check_run_here(small_config(tmp_path / "data", **changes))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"engine": {"name": "ddp", "deepspeed": {"zero_optimization": {"stage": 2}}}},
            ["deepspeed", "ddp"],
        ),
        ({"engine": {"name": "ddp", "shard": 2}}, ["shard", "ddp"]),
        (
            {"engine": {**ZERO, "compile": True, "deepspeed": {"zero_optimization": {"stage": 3}}}},
            ["compile"],
        ),
        ({"train": {"scale_weights": [1, 2]}}, ["2 weights", "3 scales"]),
        ({"train": {"scale_weights": [1, 2, -3]}}, ["train.scale_weights.2", "-3"]),
        ({"train": {"progressive": 0.5, "progressive_start": 3}}, ["progressive_start"]),
        ({"train": {"steps": "none"}}, ["null"]),
    ],
)
def test_a_config_that_no_run_can_have_is_refused(
    changes: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    with raises("config.value", *names):
        small_config(tmp_path / "data", **changes)


def test_deepspeed_keys_are_checked(tmp_path: Path) -> None:
    """DeepSpeed's own schema checks them before a folder exists."""
    engine = {**ZERO, "deepspeed": {"zero_optimization": {"stage": 9}}}
    with raises("train.deepspeed-value", "engine.deepspeed.zero_optimization.stage"):
        check_run_here(small_config(tmp_path / "data", engine=engine))


def test_a_run_that_can_begin_is_not_refused(tmp_path: Path) -> None:
    """This also holds where three processes share a batch of nine."""
    engine = {"name": "fsdp", "processes": 3}
    train = {"batch_size": 9, "steps": 20}
    check_run_here(small_config(tmp_path / "data", engine=engine, train=train))


def test_a_tokenizer_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    given = mini(tmp_path, "tokenizer.weights=given.pth").config
    for config, processes, code in (
        (given, 1, "study.tokenizer-given"),
        (mini(tmp_path).config, 3, "study.batch-indivisible"),
    ):
        with raises(code):
            require_untrained_tokenizer(config, processes)
    require_untrained_tokenizer(mini(tmp_path).config, 2)


def test_a_split_without_images_or_tokens_is_refused(tmp_path: Path) -> None:
    """Splits with both images and tokens are returned. A study without any split is refused, and so
    is a split that has only one of the two."""
    assert require_splits(mini(tmp_path).with_files()) == ["train", "val"]
    named = ["data.shapes=null", "data.images_train=i", "data.tokens_train=t"]
    assert require_splits(mini(tmp_path, *named).config) == ["train"]
    for overrides, key in (
        (["data.shapes=null"], "data.images_train"),
        ([*named, "data.images_val=j"], "data.tokens_val"),
    ):
        with raises("study.shards-missing", key):
            require_splits(mini(tmp_path, *overrides).config)


def test_folders_of_other_runs_are_refused(tmp_path: Path) -> None:
    """A study folder belongs to its runs: runs with another config or other tokens are refused by
    the run, by the report (which would be false for other settings), and by the status."""
    study = mini(tmp_path)
    first, run = study.runs()[0]
    write_config(first, run.config)
    require_matching_runs(study)
    require_matching_runs(mini(tmp_path, "train.base_lr=1"))  # it has made no step
    run.append_metrics({"kind": "train", "step": 1})
    calls: tuple[Callable[[Study], Any], ...] = (check_study_here, make_report, status_table)
    for call in calls:
        with raises("train.run-other-config", "d01-s0"):
            call(mini(tmp_path, "train.base_lr=1"))
    (run.path / "run.json").write_text(json.dumps({"data_hash": "a:b"}))
    require_matching_runs(study)  # no tokens exist yet
    for split in ("train", "val"):
        path = study.folder / "tokens" / split / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"digest": "a" if split == "train" else "c"}))
    for call in calls:
        with raises("study.other-data", "d01-s0"):
            call(study)


def test_the_number_of_classes_comes_from_the_shards(tmp_path: Path) -> None:
    """A config that gives none gets that of its images; another number is refused before any work,
    whether the study trains on the images or on tokens made of them."""
    settings = ShapesSettings(size=32, num_classes=4)
    for split in ("train", "val"):
        write_shapes(tmp_path / split, split, 16, settings, 16)
    given = [f"data.images_{split}={tmp_path / split}" for split in ("train", "val")]
    given.append("data.shapes=null")
    assert with_manifests(mini(tmp_path, *given).config).classes == 4
    for more in ([], ["data.online=true"]):
        wrong = mini(tmp_path, *given, *more, "data.num_classes=3")
        assert with_manifests(wrong.config).classes == 3
        with raises("study.classes-differ", tmp_path, 4):
            check_study_here(wrong)
    assert not (tmp_path / "mini").exists()


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    """Training and validation of other classes; validation that is a copy of the training data."""
    for name, classes in (("four", 4), ("three", 3)):
        settings = ShapesSettings(size=32, num_classes=classes)
        write_shapes(tmp_path / name, "train", 16, settings, 16)
    shutil.copytree(tmp_path / "four", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "four")

    def study(val: str) -> Study:
        given = [f"data.images_train={tmp_path / 'four'}", f"data.images_val={tmp_path / val}"]
        config = mini(tmp_path, "data.shapes=null", *given).config
        return Study(with_manifests(config), tmp_path)

    with raises("study.classes-differ", "three: has 3", "four has 4", "same classes"):
        check_study_here(study("three"))
    for val in ("copy", "link"):
        with raises("study.validation-is-training", val):
            check_study_here(study(val))


def test_a_compute_budget_counts_the_samples_that_exist(tmp_path: Path) -> None:
    """Epochs follow from the manifest of the shards, whatever the config assumes; without one, and
    without an assumption, there is no budget."""
    write_shapes(tmp_path / "train", "train", 40, ShapesSettings(size=32, num_classes=4), 16)
    write_shapes(tmp_path / "val", "val", 16, ShapesSettings(size=32, num_classes=4), 16)
    given = [f"data.images_{split}={tmp_path / split}" for split in ("train", "val")]
    given += ["data.shapes=null", "study.flops=[1e9]", "study.depths=[1,2]"]
    for more in ([], ["data.train_samples=1000"], ["data.fraction=0.5"]):
        study = Study(with_manifests(mini(tmp_path, *given, *more).config), tmp_path)
        for config, _ in study.runs():
            samples = 20 if "data.fraction=0.5" in more else 40
            flops = count_flops(shape_of(config)).training * config.train.epochs * samples
            assert flops == pytest.approx(1e9)
    far = [
        f"data.{kind}_{split}=https://x/{kind}{split}"
        for kind in ("images", "tokens")
        for split in ("train", "val")
    ]
    with raises("study.samples-unknown", "data.train_samples"):
        require_known_samples(mini(tmp_path, *given[2:], *far))
    require_known_samples(mini(tmp_path, *given[2:], *far, "data.train_samples=1000"))


def test_a_study_that_another_process_runs_is_refused(tmp_path: Path) -> None:
    study = mini(tmp_path)
    lock = take_lock(study.folder / ".lock")
    assert lock is not None
    with pytest.raises(UserError) as error, only_process(study):
        pass
    assert error.value.code == "study.in-use" and str(study.folder) in str(error.value)
    os.close(lock)
    with only_process(study):
        assert take_lock(study.folder / ".lock") is None


def test_a_changed_table_of_rates_makes_a_report_old(tmp_path: Path) -> None:
    """The report answers from this table, so a complete study with another one is not complete."""
    table = tmp_path / "rates.csv"
    table.write_text("name\n")
    study = mini(tmp_path, f"study.rates={table}")
    before = study.identity()
    assert study.identity() == before
    table.write_text("name\nd1\n")
    assert study.identity() != before
