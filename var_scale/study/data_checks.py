"""The conditions on data and tokenizer that have to hold before work begins; `checks` lists when
each is asked."""

from __future__ import annotations

from pathlib import Path

from var_scale.config.schema import Config
from var_scale.data.manifest import load_manifest
from var_scale.errors import UserError
from var_scale.files import require_content
from var_scale.scales import grid
from var_scale.study.manifests import existing_manifests
from var_scale.study.study import Study, data_folders, local


def require_one_source(study: Study) -> None:
    """The data come from one source only."""
    c, data = study.config, study.config.data
    for name, given in (
        ("images", data.images_train or data.images_val),
        ("tokens", data.tokens_train or data.tokens_val),
    ):
        if data.shapes and given:
            raise UserError(
                f"study {c.name}: data.shapes and data.{name}_* are both given; "
                f"set data.shapes=null to use your {name}",
                code="study.sources-conflict",
            )
    others = (
        data.shapes or data.images_train or data.tokens_train or data.online or c.tokenizer.weights
    )
    if data.teacher and others:
        raise UserError(
            f"study {c.name}: data.teacher makes its own tokens and tokenizer; remove "
            "data.shapes, data.images_*, data.tokens_*, data.online and tokenizer.weights",
            code="study.sources-conflict",
        )


def require_vocabulary(study: Study) -> None:
    """A teacher has at least two codes."""
    c = study.config
    if c.data.teacher and c.tokenizer.vocab_size < 2:
        raise UserError(
            f"study {c.name}: a teacher needs two tokens or more; set tokenizer.vocab_size=64",
            code="study.teacher-vocabulary",
        )


def require_enough_samples(study: Study) -> None:
    """A generated set fills at least one batch."""
    c = study.config
    if c.data.embedded and c.train_samples < c.train.batch_size:
        raise UserError(
            f"study {c.name}: {c.train_samples} training samples are fewer than a batch of "
            f"{c.train.batch_size}; make the data set larger or train.batch_size smaller",
            code="study.too-few-samples",
        )


def require_image_size(study: Study) -> None:
    """The generated images have the size that the tokenizer takes."""
    c, size = study.config, study.config.tokenizer.image_size
    if c.data.shapes and grid(c.data.shapes.size) != size:
        wanted = size[0] if size[0] == size[1] else list(size)
        raise UserError(
            f"study {c.name}: the tokenizer takes images of {size[0]}x{size[1]} pixels; "
            f"set data.shapes.size={wanted}",
            code="study.image-size",
        )


def require_sources(study: Study) -> None:
    """Images or an embedded data set are given, or tokens with their tokenizer."""
    c = study.config
    images = c.data.embedded or (c.data.images_train and c.data.images_val)
    if not images and not (c.data.tokens_train and c.data.tokens_val and c.tokenizer.weights):
        raise UserError(
            f"study {c.name}: no data are given; set data.images_train and data.images_val "
            "(folders of image shards), or data.shapes, or data.tokens_train, data.tokens_val and "
            "tokenizer.weights",
            code="study.sources-missing",
        )


def require_known_samples(study: Study) -> None:
    """Compute budgets become epochs by the number of training samples, so that has to be known."""
    data = study.config.data
    if study.spec.flops and not (data.embedded or data.train_samples):
        raise UserError(
            f"study {study.config.name}: study.flops needs the number of training samples, and no "
            "manifest on a disk gives it; set data.train_samples",
            code="study.samples-unknown",
        )


def require_given_shards(study: Study) -> None:
    """The folders of shards that the config names and the study reads are complete."""
    data = study.config.data
    tokens = [] if data.online else [data.tokens_train, data.tokens_val]
    images = [data.images_train, data.images_val] if not any(tokens) else []
    for folder in (folder for folder in tokens + images if folder and local(folder)):
        if folder in tokens or study.needs_data():
            load_manifest(Path(folder), check_files=False)


def require_weights(config: Config) -> None:
    """The tokenizer's weights exist. Weights on the hub are downloaded now, before ranks ask."""
    weights = config.tokenizer.weights
    if weights and not local(weights):
        from var_scale.model.hub import weights_file

        weights_file(weights)
    elif not weights or not Path(weights).exists():
        raise UserError(
            f"tokenizer.weights: {weights or 'nothing is given'}"
            + (" does not exist" if weights else "")
            + "; train a tokenizer with `var-scale tokenizer train`, or give the file of one",
            code="study.weights-missing",
        )
    elif weights:
        require_content(Path(weights))


def require_splits(config: Config) -> list[str]:
    """Images and tokens are named for each split that is to be tokenised; returns those splits."""
    data = config.data
    named = {
        split: (getattr(data, f"images_{split}"), getattr(data, f"tokens_{split}"))
        for split in ("train", "val")
    }
    given = [split for split, folders in named.items() if any(folders)]
    for split in given or ["train"]:
        if not all(named[split]):
            raise UserError(
                f"data.images_{split} and data.tokens_{split} are both needed to tokenise the "
                f"split {split}; set both, or neither to skip it",
                code="study.shards-missing",
            )
    return given


def require_named_shards(config: Config) -> None:
    """The shards that a run reads are named."""
    data = config.data
    kind = "images" if data.online else "tokens"
    if not (getattr(data, f"{kind}_train") and getattr(data, f"{kind}_val")):
        how = (
            "data.online=true trains from image shards"
            if data.online
            else "make token shards with `var-scale data tokenize`, or train from images with "
            "data.online=true"
        )
        raise UserError(
            f"data.{kind}_train and data.{kind}_val are needed for training; {how}",
            code="study.shards-missing",
        )


def require_complete_shards(config: Config) -> None:
    """The shards that a run reads from a disk have a valid manifest and are all on it."""
    from var_scale.data.remote import located

    for folder in data_folders(config):
        place = located(folder, config.data.cache, config.data.cache_gb)
        if isinstance(place, Path):
            load_manifest(place)


def require_matching_classes(config: Config) -> None:
    """Shards that exist already have the config's number of classes, and validation data are no
    copy of the training data."""
    found = dict(existing_manifests(config))
    first, data = next(iter(found), ""), config.data
    for folder, manifest in found.items():
        classes, expected = manifest.num_classes, found[first].num_classes
        fault = f"{first} has {expected}; write both with the same classes"
        if classes == expected != config.classes:
            fault = f"the config has {config.classes}; set data.num_classes={classes}"
        if classes != expected or classes != config.classes:
            raise UserError(
                f"{folder}: has {classes} classes, but {fault}", code="study.classes-differ"
            )
    for train, val in (
        (data.tokens_train, data.tokens_val),
        (data.images_train, data.images_val),
    ):
        if train in found and val in found and found[train].digest == found[val].digest:
            raise UserError(
                f"{val}: holds the same samples as the training data {train}; give validation data "
                "that the models do not train on",
                code="study.validation-is-training",
            )
