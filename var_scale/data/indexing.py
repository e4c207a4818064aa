"""Using existing WebDataset tars in place: checking every sample, and writing index and
manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.data.findings import ONE_BASED, Findings, Tally, say_from_one
from var_scale.data.images import read_image
from var_scale.data.manifest import (
    MANIFEST_NAME,
    TOKEN_FIELDS,
    Manifest,
    ShardInfo,
    load_manifest,
)
from var_scale.data.shards import index_shard, read_index
from var_scale.data.tar_index import npy_header, other_archives, tar_names
from var_scale.data.tar_samples import PAYLOADS
from var_scale.errors import UserError
from var_scale.files import require_exists
from var_scale.machine import cores
from var_scale.progress import progress, say


def index_folder(
    folder: Path,
    kind: str = "image",
    split: str = "train",
    num_classes: int | None = None,
    tokens: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    label_key: str | None = None,
) -> Manifest:
    """Index existing WebDataset tars: decode every image, write an index beside each `*.tar` of
    `folder` (sorted by name), and write the manifest.

    Args:
        num_classes: by default one more than the largest label, or the number of `class_names`.
        tokens: TOKEN_FIELDS, for kind "tokens".
        class_names: by default those that the folder had before.
        label_key: the field of each sample's .json that holds its class.

    Raises:
        UserError: as in `index_tar`; or no tar, a wrong kind, or a label outside of the classes.
    """
    folder = Path(folder)
    require_exists(folder)
    names, others = tar_names(folder), other_archives(folder)
    if kind not in PAYLOADS:
        raise UserError(
            f"{folder}: kind {kind!r} is not one of {', '.join(PAYLOADS)}", code="data.kind"
        )
    if not split:
        raise UserError(
            f"{folder}: the split has no name; give one such as train", code="data.split-name"
        )
    if not names:
        raise UserError(
            f"{folder}: no *.tar file here{others and ', but '}{others}; give the folder "
            "that holds the shards",
            code="data.no-tars",
        )
    if kind == "tokens" and sorted(tokens or ()) != sorted(TOKEN_FIELDS):
        raise UserError(
            f"{folder}: token shards need {', '.join(TOKEN_FIELDS)} to be indexed; give them",
            code="data.token-fields",
        )
    if class_names is None and num_classes is None and (folder / MANIFEST_NAME).exists():
        with contextlib.suppress(UserError):
            class_names = load_manifest(folder, check_files=False).class_names
    if others:
        say(f"warning: {folder}: has {others}")
    source = {"name": folder.name} | about_labels(class_names, label_key)
    shards, classes, findings = list[ShardInfo](), 0, Findings()
    smallest, largest = 2**31, 0
    with progress(f"index {folder}", len(names), "shards") as bar:
        for done, name in enumerate(names, 1):
            shard, found = adopt_shard(folder, name, kind, tokens, label_key)
            shards.append(shard)
            findings.merge(asdict(found))
            labels = read_index(folder, shard)["label"]
            smallest, largest = min(smallest, int(labels.min())), max(largest, int(labels.max()))
            classes = classes_of(folder / name, largest, num_classes, class_names)
            bar.update(done)
    manifest = Manifest(kind, split, classes, source, tokens, tuple(shards))
    manifest.write(folder)
    findings.say(folder)
    say_from_one(folder, smallest, largest)
    return manifest


def about_labels(class_names: Sequence[str] | None, label_key: str | None) -> dict[str, Any]:
    """The entries about labels in the `source` of a manifest."""
    return ({"class_names": list(class_names)} if class_names else {}) | (
        {"label_key": label_key} if label_key else {}
    )


def adopt_shard(
    folder: Path,
    name: str,
    kind: str,
    tokens: dict[str, Any] | None = None,
    label_key: str | None = None,
) -> tuple[ShardInfo, Findings]:
    """Check every member of a tar, decode every image, and write the index beside it.

    Raises:
        UserError: as in `index_tar`, or an image cannot be decoded.
    """
    findings = Findings()
    shard, records = index_shard(folder, name, kind, label_key, findings.unused)
    if tokens is not None:
        check_tokens(folder / name, records, tokens)
    if kind == "image":
        findings.rotated = decode_all(folder / name, records)
    return shard, findings


def classes_of(
    where: Path, largest: int, num_classes: int | None, class_names: Sequence[str] | None
) -> int:
    """The number of classes: as given, as named, or one more than the `largest` label.

    Raises:
        UserError: the given number is too small.
    """
    given = len(class_names) if class_names else num_classes
    if given is not None and largest >= given:
        raise UserError(
            f"{where}: class {largest} is outside of 0 to {given - 1}; give the right number of "
            f"classes{ONE_BASED * (largest == given)}",
            code="data.class-range",
        )
    return given or largest + 1


def check_tokens(path: Path, records: np.ndarray, tokens: dict[str, Any]) -> None:
    """Check that the first .npy has the shape of the manifest and all have the same size."""
    expected = (tokens["views"], tokens["length"])
    _, shape, dtype = npy_header(path, int(records["offset"][0]))
    if (
        shape != expected
        or dtype != np.dtype(tokens["dtype"])
        or (records["size"] != records["size"][0]).any()
    ):
        raise UserError(
            f"{path}: holds {dtype} arrays {shape}, but the manifest has {tokens['dtype']} "
            f"{expected}; give the right shape",
            code="data.token-shape",
        )


def decode_all(tar: Path, records: np.ndarray) -> Tally:
    """Decode every image of a shard, in threads (Pillow releases Python's lock).

    Returns:
        The images with an EXIF orientation.
    """
    mapped = np.memmap(tar, np.uint8, "r")

    def decode(number: int) -> tuple[str, bool]:
        start, size = int(records["offset"][number]), int(records["size"][number])
        where = f"{tar}: sample {number} (byte {start})"
        return where, read_image(mapped[start : start + size].tobytes(), where).orientation != 1

    rotated = Tally()
    with ThreadPoolExecutor(cores()) as pool:
        for where, turned in pool.map(decode, range(len(records))):
            rotated.add(where, turned)
    return rotated
