"""Checking and describing folders of shards: `var-scale data verify` and `data info`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.data.findings import from_one
from var_scale.data.image_sizes import image_size
from var_scale.data.indexing import check_tokens, decode_all
from var_scale.data.manifest import CHANGED, Manifest, ShardInfo, load_manifest, lost_files
from var_scale.data.shards import read_index
from var_scale.data.tar_index import index_tar
from var_scale.errors import UserError
from var_scale.files import require_exists, sha256_file
from var_scale.progress import progress

SIDES = 2000  # images whose size `describe_folder` reads


def verify_folder(folder: Path, drop: bool = False) -> list[str]:
    """All problems of a folder, one line each: manifest, sizes, checksums, indices that do not fit
    their tars, images that cannot be decoded.

    `drop` rewrites the manifest without the shards that have a problem. The folder then is another
    data set, with another digest.
    """
    folder = Path(folder)
    require_exists(folder)
    try:
        manifest = load_manifest(folder, check_files=False)
    except UserError as error:
        if drop:
            raise
        return [str(error)]
    if manifest.url:
        raise UserError(
            f"{folder}: the tars are at {manifest.url}; a run compares each with its checksum when "
            "it downloads it",
            code="data.remote-verify",
        )
    problems, sound = list[str](), list[ShardInfo]()
    with progress(f"verify {folder}", len(manifest.shards), "shards") as bar:
        for done, shard in enumerate(manifest.shards, 1):
            lost = lost_files(folder, manifest, shard).items()
            found = [f"{path}: {problem}" for path, problem in lost]
            found = found or _shard_problems(folder, shard, manifest)
            problems += found
            sound += [] if found else [shard]
            bar.update(done, f"{len(problems)} bad" if problems else "")
    if drop and problems:
        if not sound:
            raise UserError(
                f"{folder}: every shard has a problem, so nothing would remain; write the data "
                "again",
                code="data.shards-damaged",
            )
        replace(manifest, shards=tuple(sound)).write(folder)
    return problems


def _shard_problems(folder: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    """The first problem of a shard whose files exist; empty if it is sound."""
    if sha256_file(folder / shard.index) != shard.index_sha256:
        return [f"{folder / shard.index}: {CHANGED}"]
    if sha256_file(folder / shard.name) != shard.sha256:
        return [f"{folder / shard.name}: {CHANGED}{_what_changed(folder, shard, manifest)}"]
    try:
        records = index_tar(folder / shard.name, manifest.kind, manifest.source.get("label_key"))
        if manifest.tokens is not None:
            check_tokens(folder / shard.name, records, manifest.tokens)
        if manifest.kind == "image":
            decode_all(folder / shard.name, records)
    except UserError as error:
        return [str(error)]
    if not np.array_equal(records, read_index(folder, shard)):
        return [
            f"{folder / shard.index}: does not fit {shard.name}; run `var-scale data index "
            f"{folder}`"
        ]
    if records["label"].max() >= manifest.num_classes:
        return [
            f"{folder / shard.name}: class {records['label'].max()} is outside of 0 to "
            f"{manifest.num_classes - 1}"
        ]
    return []


def _what_changed(folder: Path, shard: ShardInfo, manifest: Manifest) -> str:
    """The first sample that shows how a shard changed, in parentheses; empty if all can be read."""
    tar = folder / shard.name
    try:
        records = index_tar(tar, manifest.kind, manifest.source.get("label_key"))
        before = read_index(folder, shard)
        if len(records) != len(before):
            return f" (it holds {len(records)} samples, its index {len(before)})"
        if odd := np.flatnonzero(records != before).tolist():
            return f" (sample {odd[0]}, byte {records['offset'][odd[0]]}, differs from its index)"
        if manifest.kind == "image":
            decode_all(tar, records)
    except UserError as error:
        return f" ({str(error).removeprefix(f'{tar}: ')})"
    return ""


def describe_folder(folder: Path) -> dict[str, Any]:
    """The facts that `var-scale data info` prints: counts, classes, bytes, tokens, source,
    digest."""
    manifest = load_manifest(folder)
    records = [read_index(folder, shard) for shard in manifest.shards]
    counts = Counter(np.concatenate([index["label"] for index in records]).tolist())
    names = manifest.class_names
    named = (
        ", ".join(f"{number}: {name}" for number, name in enumerate(names[:5])) if names else None
    )
    facts = {
        "folder": str(folder),
        "kind": manifest.kind,
        "split": manifest.split,
        "samples": manifest.num_samples,
        "classes": manifest.num_classes,
        "class_names": named,
        "classes_present": len(counts),
        "samples_per_class_min": min(counts.values()),
        "samples_per_class_max": max(counts.values()),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    if manifest.kind == "image" and not manifest.url:
        sides = np.array(_sides(folder, manifest, records))
        for place, name in enumerate(("width", "height")):
            facts[f"{name}_min_median_max"] = " ".join(
                f"{value:.0f}" for value in np.quantile(sides[:, place], (0, 0.5, 1))
            )
        facts["sides_of"] = f"{len(sides)} images"
    if remark := from_one(min(counts), max(counts)):
        facts["warning"] = remark
    source = {
        key: value for key, value in manifest.source.items() if key not in ("class_names", "images")
    }
    return {**facts, "tokens": manifest.tokens, "source": source, "digest": manifest.digest}


def _sides(folder: Path, manifest: Manifest, records: list[np.ndarray]) -> list[tuple[int, int]]:
    """Width and height of a few thousand images, spread over the shards, from their headers."""
    found = []
    step = max(1, manifest.num_samples // SIDES)
    for shard, index in zip(manifest.shards, records, strict=True):
        with open(folder / shard.name, "rb") as file:
            for record in index[::step]:
                file.seek(int(record["offset"]))
                payload = file.read(int(record["size"]))
                found.append(_side(payload, f"{folder / shard.name}: byte {record['offset']}"))
    return found


def _side(payload: bytes, where: str) -> tuple[int, int]:
    """Width and height of an image."""
    height, width = image_size(lambda _: payload, where)
    return width, height
