"""What a config leaves out and the manifests of its shards tell: classes and training samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from var_scale.config.schema import Config
from var_scale.data.manifest import MANIFEST_NAME, Manifest, load_manifest


def existing_manifests(config: Config) -> Iterator[tuple[str, Manifest]]:
    """Every folder of shards on a disk that the config names and that has a manifest, with the
    training data first and tokens before images."""
    data = config.data
    for folder in (data.tokens_train, data.images_train, data.tokens_val, data.images_val):
        if folder and (Path(folder) / MANIFEST_NAME).exists():
            yield folder, load_manifest(Path(folder), check_files=False)


def with_manifests(config: Config) -> Config:
    """The config with the number of classes of its shards, if it gives none itself, and with the
    number of its training samples.

    `data.train_samples` is an assumption for the time before the shards exist. A run trains on what
    exists, so plans and compute budgets have to count the same samples.
    """
    data, changes = config.data, dict[str, Any]()
    if data.embedded:
        return config
    found = dict(existing_manifests(config))
    if found and not data.num_classes:
        changes["num_classes"] = next(iter(found.values())).num_classes
    train = next((found[f] for f in (data.tokens_train, data.images_train) if f in found), None)
    if train:
        changes["train_samples"] = train.num_samples
    return config.model_copy(update={"data": data.model_copy(update=changes)})
