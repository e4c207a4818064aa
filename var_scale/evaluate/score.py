"""Samples against a reference, and reference statistics of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from var_scale.data.remote import RemoteShards, located
from var_scale.errors import UserError
from var_scale.evaluate.extract import (
    compare_sets,
    features_of,
    load_extractor,
    read_reference,
    say_if_few,
    statistics,
)
from var_scale.evaluate.generate import RECORD
from var_scale.evaluate.read_images import open_set, require_size
from var_scale.files import read_json
from var_scale.run_folder import RunFolder
from var_scale.train.saved_config import saved_config


def validation_tokens(model: str) -> Path | RemoteShards:
    """The validation tokens that the config of a run folder names.

    Raises:
        UserError: `model` is no run folder, or its config names no tokens (code
            `evaluate.tokens-missing`).
    """
    folder = Path(model)
    data = saved_config(folder).data if RunFolder(folder).config.exists() else None
    if not data or not data.tokens_val:
        raise UserError(
            f"{model}: does not name its validation tokens; give --tokens FOLDER",
            code="evaluate.tokens-missing",
        )
    return located(data.tokens_val, data.cache, data.cache_gb)


def write_statistics(images: Path, out: Path, extractor: str, device: torch.device) -> str:
    """Write the statistics of images to the new file `out`; returns a line that describes them.

    Raises:
        UserError: `out` exists or is no .npz file (code `evaluate.statistics-file`).
    """
    if out.suffix != ".npz" or out.exists():
        fault = (
            "exists already; delete it, or choose another name"
            if out.exists()
            else "give a name that ends in .npz"
        )
        raise UserError(f"{out}: {fault}", code="evaluate.statistics-file")
    network = load_extractor(extractor, device)
    found = features_of(images, network)
    found.save(out, network.name)
    return f"{out}: {found.count:,} images, {len(found.mean_D)} features, {network.name}"


def score_samples(
    samples: Path, reference: Path, extractor: str, device: torch.device
) -> dict[str, Any]:
    """FID, sFID, IS, precision and recall of samples, as far as the extractor's features allow.

    Raises:
        UserError: samples are missing (code `evaluate.samples-missing`).
    """
    network = load_extractor(extractor, device)
    size, images = open_set(samples)
    require_size(samples, size, network.size, f"the extractor {extractor} takes")
    expected = read_reference(reference, network, size)
    found = statistics(images, network, label=f"features of {samples.name}")
    record = samples.with_name(f"{samples.name}.json")
    if samples.is_dir():
        record = samples / RECORD
    made = {"made": read_json(record, "description of samples")} if record.exists() else {}
    if made and (count := made["made"].get("count", found.count)) != found.count:
        raise UserError(
            f"{samples}: holds {found.count:,} of {count:,} images; generate the others with the "
            "same `sample` command first",
            code="evaluate.samples-missing",
        )
    scores = compare_sets(expected, found, network)
    say_if_few(found, network)
    return scores | {"samples_from": str(samples), "reference_from": str(reference)} | made
