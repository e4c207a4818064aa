"""Images from class folders, a CSV or existing tars as globally shuffled shards."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from var_scale.data.findings import ONE_BASED, Findings, Tally
from var_scale.data.image_source import Item, Source, find_splits, read_source
from var_scale.data.images import FIX, read_image
from var_scale.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.shards import Sample, ShardSet
from var_scale.data.workers import in_workers
from var_scale.errors import UserError
from var_scale.files import write_text
from var_scale.machine import cores
from var_scale.progress import progress, say

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are kept; others are converted to PNG. MPO is a JPEG followed by other views,
as many phones write it."""
BROKEN_NAME = "broken.csv"


def shard_images(
    source: Path,
    out: Path,
    split: str | None = None,
    seed: int = 0,
    samples_per_shard: int = 1024,
    max_broken: float = 0.01,
    processes: int | None = None,
    label_key: str | None = None,
    class_list: list[str] | None = None,
    apply_exif: bool = False,
) -> dict[str, Manifest]:
    """Write the images of `source` as shards: into OUT/train and OUT/val if it has folders of these
    splits (see SPLITS), otherwise into OUT.

    The order is one random permutation keyed by `seed`; the bytes depend on nothing else. Images
    that cannot be decoded are skipped and listed in broken.csv. A killed command continues.

    Args:
        source: a folder of class folders, or one with such folders train and val (ImageNet); a .csv
            with the columns path and label (a number or a name; paths relative to the file); or a
            folder of WebDataset tars.
        max_broken: share of broken images from which on the command stops.
        label_key: field of each .json in tars that holds the class.
        class_list: names of numbered classes.
        apply_exif: write images with an EXIF orientation upright, as PNG. The official code ignores
            it.

    Raises:
        UserError: nothing to read; the output has other settings; or too many broken images.
    """
    if not 0 <= max_broken <= 1:
        raise UserError(
            f"--max-broken {max_broken}: give a share from 0 to 1", code="data.shard-settings"
        )
    if split is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", split):
        raise UserError(
            f"--split {split}: give a name of letters, digits, dots and dashes, such as train",
            code="data.split-name",
        )
    if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(
            f"{out}: is inside the source {source}; give a folder outside of it",
            code="data.out-in-source",
        )
    found = find_splits(source) if source.is_dir() else {}
    if found:
        train = read_source(found["train"], None, source.resolve().name, label_key)
        splits = {"train": train} | {
            name: read_source(folder, train.classes, train.name, label_key)
            for name, folder in found.items()
            if name != "train"
        }
        folders = {name: out / name for name in splits}
    else:
        known = (
            load_manifest(out.parent / "train", check_files=False).class_names
            if _beside_train(out)
            else None
        )
        splits = {split or "train": read_source(source, known, label_key=label_key)}
        folders = {split or "train": out}
    if class_list:
        splits = {name: replace(images, classes=class_list) for name, images in splits.items()}
    settings = _Settings(seed, samples_per_shard, max_broken, processes, apply_exif)
    return {name: _write(images, folders[name], name, settings) for name, images in splits.items()}


def _beside_train(out: Path) -> bool:
    """Whether OUT is beside the shards of a training split, whose classes it then shares."""
    return out.name != "train" and (out.parent / "train" / MANIFEST_NAME).exists()


@dataclass(frozen=True)
class _Settings:
    """The arguments of `shard_images` that all splits share."""

    seed: int
    samples_per_shard: int
    max_broken: float
    processes: int | None
    apply_exif: bool


def _write(source: Source, folder: Path, split: str, settings: _Settings) -> Manifest:
    """Write one split, shard by shard in worker processes."""
    samples_per_shard = settings.samples_per_shard
    total = len(source.items)
    largest = max(item.label for item in source.items)
    classes = len(source.classes) if source.classes else 1 + largest
    if largest >= classes:
        raise UserError(
            f"{source.name}: class {largest} has no name, only {classes} are given; name all "
            f"classes{ONE_BASED * (largest == classes)}",
            code="data.class-unnamed",
        )
    if classes > 2 * (present := len({item.label for item in source.items})) + 10:
        say(f"warning: only {present} of {classes} classes have an image; check the labels")
    about: dict[str, Any] = {
        "name": source.name,
        "digest": source.digest,
        "shuffle_seed": settings.seed,
        "class_names": source.classes,
    }
    if settings.apply_exif:
        about["exif_orientation"] = "applied"
    shards = ShardSet(folder, "image", split, classes, samples_per_shard, about)
    if shards.complete:
        say(f"{folder}: is complete")
        return shards.finish()
    order = epoch_permutation(total, settings.seed, 0)
    count = -(-total // samples_per_shard)
    found = ((number, shards.record(number)) for number in range(count))
    # A shard with broken images is written again: the user may have fixed them since.
    records = {number: record for number, record in found if record and not record["broken"]}
    todo = [number for number in range(count) if number not in records]

    def jobs() -> Iterator[tuple[ShardSet, int, list[Item], bool]]:
        for number in todo:
            places = order[number * samples_per_shard : (number + 1) * samples_per_shard]
            items = [source.items[place] for place in places.tolist()]
            yield shards, number, items, settings.apply_exif

    done, broken = sum(record["read"] for record in records.values()), list[list[str]]()
    findings = Findings()
    for record in records.values():
        findings.merge(record)
    with progress(f"shard {split}", total, "images", initial=done) as bar:
        for record in in_workers(_shard, jobs(), settings.processes or cores()):
            done += record["read"]
            broken += record["broken"]
            findings.merge(record)
            if len(broken) > settings.max_broken * total:
                _report(folder, broken)
                raise UserError(
                    f"{folder}: {len(broken)} of {done} images cannot be read, more than "
                    f"{settings.max_broken:.2%} of {total}, such as {' '.join(min(broken))}; "
                    f"{folder / BROKEN_NAME} lists them: fix them or raise --max-broken",
                    code="data.too-many-broken",
                )
            bar.update(done, f"{len(broken)} broken" if broken else "")
    (folder / BROKEN_NAME).unlink(missing_ok=True)  # of an earlier attempt
    if broken:
        _report(folder, broken)
        say(
            f"warning: {len(broken)} of {total} images cannot be read and were skipped; "
            f"{folder / BROKEN_NAME} lists them"
        )
    if not settings.apply_exif:
        findings.say(folder)
    elif findings.rotated.count:
        say(f"{folder}: {findings.rotated.count} images were written upright by their EXIF")
    return shards.finish(count)


def _report(folder: Path, broken: list[list[str]]) -> None:
    """Write a CSV of paths and reasons."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["path", "reason"], *sorted(broken)])
    write_text(folder / BROKEN_NAME, stream.getvalue())


def _shard(job: tuple[ShardSet, int, list[Item], bool]) -> dict[str, Any]:
    """In a worker: read, decode and write the images of one shard."""
    shards, number, items, apply_exif = job
    samples, broken, rotated = [], [], Tally()
    for item in items:
        try:
            sample, turned = _sample(item, apply_exif)
        except UserError as error:
            reason = str(error).removeprefix(f"{item.where} ").removesuffix(FIX)
            broken.append([item.where, reason])
        else:
            samples.append(sample)
            rotated.add(item.where, turned)
    note = {"read": len(items), "broken": broken, "rotated": asdict(rotated)}
    shards.write(number, samples, note)
    return note


def _sample(item: Item, apply_exif: bool) -> tuple[Sample, bool]:
    """The sample of an image, and whether it has an EXIF orientation.

    It has its own bytes if its format is in KEPT, unless an orientation is applied.
    """
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            payload = file.read(item.size)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{item.where} cannot be read ({reason})", code="data.image-invalid"
        ) from None
    decoded = read_image(payload, item.where)
    turned = decoded.orientation != 1
    if decoded.format in KEPT and not (apply_exif and turned):
        return Sample(payload, item.label, KEPT[decoded.format]), turned
    stream = io.BytesIO()
    (decoded.upright() if apply_exif else decoded.image).save(stream, "png")
    return Sample(stream.getvalue(), item.label, "png"), turned
