"""Runs whose study was moved, copied or renamed: every command finds the files beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.raises import raises
from tests.runs import TREE, run_here, small_config
from var_scale.config.load import check, merge, write_config
from var_scale.evaluate.score import validation_tokens
from var_scale.evaluate.source import load_source
from var_scale.model.load import new_tokenizer, save_tokenizer
from var_scale.train.official import export_checkpoint
from var_scale.train.saved_config import saved_config

PLACES = {
    "tokens_train": "tokens/train",
    "tokens_val": "tokens/val",
    "images_train": "images/train",
    "images_val": "images/val",
}


def write_study(folder: Path, weights: str = "tokenizer/tokenizer.safetensors") -> Path:
    """A study without a trained run, whose config names all of its files; returns the run."""
    data = {key: str(folder / place) for key, place in PLACES.items()}
    for place in data.values():
        Path(place).mkdir(parents=True)
    file = folder / weights
    file.parent.mkdir(parents=True)
    file.touch()
    config = check(merge(TREE, {"data": data, "tokenizer": {"weights": str(file)}}), "test")
    write_config(config, folder / "d02-s0" / "config.yaml")
    return folder / "d02-s0"


def files_of(run: Path) -> list[str]:
    """All places that the config of a run names."""
    config = saved_config(run)
    return [*(getattr(config.data, key) for key in PLACES), str(config.tokenizer.weights)]


def study_files(study: Path) -> list[str]:
    """Where those places are in a study's folder."""
    return [
        *(str(study / p) for p in PLACES.values()),
        str(study / "tokenizer/tokenizer.safetensors"),
    ]


@pytest.mark.parametrize("to", ["new/study", "new/renamed"])
def test_files_of_a_moved_study(to: str, tmp_path: Path) -> None:
    """Moved with its runs folder, or renamed as well."""
    write_study(tmp_path / "old" / "study")
    (tmp_path / to).parent.mkdir()
    (tmp_path / "old" / "study").rename(tmp_path / to)
    assert files_of(tmp_path / to / "d02-s0") == study_files(tmp_path / to)


def test_a_copy_does_not_depend_on_the_original(tmp_path: Path) -> None:
    """The files of the copy come first, although those of the original exist."""
    write_study(tmp_path / "old" / "study")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    for root in ("old", "new"):
        assert files_of(tmp_path / root / "study" / "d02-s0") == study_files(
            tmp_path / root / "study"
        )


def test_files_outside_of_the_study_keep_their_place(tmp_path: Path) -> None:
    """Also where the study has a file of the same name, and where they no longer exist."""
    outside = tmp_path / "elsewhere" / "tokenizer" / "tokenizer.safetensors"
    run = write_study(tmp_path / "old" / "study")
    outside.parent.mkdir(parents=True)
    outside.touch()
    config = saved_config(run)
    for weights in (str(outside), "hf://owner/name/vae.pth", str(tmp_path / "gone" / "vae.pth")):
        tokenizer = config.tokenizer.model_copy(update={"weights": weights})
        write_config(config.model_copy(update={"tokenizer": tokenizer}), run / "config.yaml")
        assert saved_config(run).tokenizer.weights == weights


def test_the_tokenizer_of_a_moved_single_run(tmp_path: Path) -> None:
    """`train` without a study saves RUNS/NAME/tokenizer for the run RUNS/single/NAME."""
    run = write_study(tmp_path / "old" / "d16")
    (tmp_path / "old" / "single").mkdir()
    run.rename(tmp_path / "old" / "single" / "d16")
    (tmp_path / "old").rename(tmp_path / "new")
    assert files_of(tmp_path / "new" / "single" / "d16") == study_files(tmp_path / "new" / "d16")


def test_what_is_no_run(tmp_path: Path) -> None:
    """A folder that does not exist is called that."""
    with raises("file.missing", tmp_path / "none", "does not exist"):
        saved_config(tmp_path / "none")
    with raises("train.no-run", tmp_path):
        saved_config(tmp_path)


def test_a_moved_study_is_read_by_every_command(tmp_path: Path) -> None:
    """Sampling, evaluation and export use the tokenizer and the tokens beside the run, and not
    those that now are at the old place."""
    old, new = tmp_path / "old" / "study", tmp_path / "new" / "study"
    config = small_config(old, train={"steps": 2})
    tokens = {f"tokens_{split}": str(old / "tokens" / split) for split in ("train", "val")}
    for split in ("train", "val"):
        (old / "tokens").mkdir(exist_ok=True)
        (old / split).rename(old / "tokens" / split)
    config = config.model_copy(update={"data": config.data.model_copy(update=tokens)})
    code, _ = run_here(config, old / "d02-s0")
    assert code == 0
    (tmp_path / "new").mkdir()
    old.rename(new)
    torch.manual_seed(1)
    save_tokenizer(new_tokenizer(config.tokenizer), old / "tokenizer" / "tokenizer.safetensors")
    source = load_source(str(new / "d02-s0"), torch.device("cpu"))
    torch.manual_seed(0)  # as small_config does
    expected = new_tokenizer(config.tokenizer).state_dict()
    weights = source.var.vae_proxy[0].quantize.embedding.weight
    assert torch.equal(weights, expected["quantize.embedding.weight"])
    assert validation_tokens(str(new / "d02-s0")) == new / "tokens" / "val"
    shutil.rmtree(new / "tokens")  # an export does not need them
    assert export_checkpoint(new / "d02-s0", tmp_path / "ar.pth") == 0
    saved = torch.load(tmp_path / "ar.pth", weights_only=True)["trainer"]["vae_local"]
    assert torch.equal(saved["quantize.embedding.weight"], weights)
