"""Images as people have them (class folders, a CSV, other people's tars) to globally shuffled shards."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from var_scale.data.images import open_image
from var_scale.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.shards import Sample, ShardSet
from var_scale.data.tar_index import index_tar
from var_scale.data.workers import in_workers
from var_scale.errors import UserError
from var_scale.files import canonical_hash, write_text
from var_scale.machine import cores
from var_scale.progress import progress, say

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""formats whose bytes go into the shards as they are; others are written as PNG"""
BROKEN_NAME = "broken.csv"


@dataclass(frozen=True)
class Item:
    """One image: a file, or `size` bytes from `offset` of a tar; and its class."""

    path: str
    label: int
    offset: int = 0
    size: int = -1

    @property
    def where(self) -> str:
        """For messages."""
        return self.path if self.size < 0 else f"{self.path} (byte {self.offset})"


@dataclass(frozen=True)
class Source:
    """The images of one split, in an order that depends on their names alone."""

    items: list[Item]
    classes: list[str] | None
    """names by class number, where they are known"""
    name: str
    digest: str
    """of all names and classes"""


def shard_images(source: Path, out: Path, split: str | None = None, seed: int = 0, samples_per_shard: int = 1024, max_broken: float = 0.01,
                 processes: int | None = None, label_key: str | None = None, class_list: list[str] | None = None) -> dict[str, Manifest]:
    """Write the images of `source` as shards: into OUT/train and OUT/val where it has folders train and val, else into OUT.

    `source`: a folder of class folders, or one that holds such folders train and val (ImageNet); a .csv with the columns path and label (a
    number or a name; paths relative to the file); a folder of WebDataset tars. The order is one random permutation keyed by `seed`; the
    bytes depend on nothing else. Images that cannot be decoded are left out and listed in broken.csv. Killed, the same command goes on.
    UserError: nothing to read; other settings than the folder's; more than the share `max_broken` of a split cannot be decoded.
    """
    if not 0 <= max_broken <= 1:
        raise UserError(f"--max-broken {max_broken}: give a share from 0 to 1")
    if split is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", split):
        raise UserError(f"--split {split}: give a name of letters, digits, dots and dashes, such as train")
    if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out}: lies in the source {source}; give a folder outside of it")
    splits = {}
    if source.is_dir() and (source / "train").is_dir():
        splits["train"] = train = read_source(source / "train", name=source.resolve().name)
        for name in ("val", "validation", "test"):
            if (source / name).is_dir():
                splits["val" if name == "validation" else name] = read_source(source / name, train.classes, train.name)
        folders = {name: out / name for name in splits}
    else:
        known = load_manifest(out.parent / "train", check_files=False).class_names if _beside_train(out) else None
        splits[split or "train"] = read_source(source, known, label_key=label_key, class_list=class_list)
        folders = {split or "train": out}
    return {name: _write(found, folders[name], name, seed, samples_per_shard, max_broken, processes) for name, found in splits.items()}


def _beside_train(out: Path) -> bool:
    """Whether OUT lies beside the shards of a training split, whose classes are then its own."""
    return out.name != "train" and (out.parent / "train" / MANIFEST_NAME).exists()


def read_source(
    path: Path, classes: list[str] | None = None, name: str = "", label_key: str | None = None, class_list: list[str] | None = None
) -> Source:
    """What there is to read; `name` is that of the data set, by default the folder's or file's.

    `classes`: the names of the training split, which the classes of another one must be among. `label_key`: the field of tars' .json that
    holds the class. `class_list`: names of numbered classes.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        items, names = _from_csv(path, classes)
    elif not path.is_dir():
        raise UserError(f"{path}: no such folder or .csv file; give a folder of class folders, a CSV with path,label, or a folder of tars")
    else:
        tars, folders = list(path.glob("*.tar")), any(entry.is_dir() and entry.name[0] != "." for entry in os.scandir(path))
        if tars and folders:
            say(f"{path}: {len(tars)} tar{'s' * (len(tars) > 1)} beside the class folders, left aside")
        items, names = _from_tars(path, label_key) if tars and not folders else _from_folders(path, classes)
        if class_list:
            names = class_list
    if not items:
        raise UserError(f"{path}: no image here ({', '.join(EXTENSIONS)})")
    identity = [[os.path.relpath(item.path, path if path.is_dir() else path.parent), item.offset, item.label] for item in items]
    return Source(items, names, name or path.resolve().stem, canonical_hash(identity))


def _from_folders(path: Path, known: list[str] | None) -> tuple[list[Item], list[str]]:
    """Class folders in the order of their names, as torchvision's ImageFolder."""
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != ".")
    if not found:
        loose = sum(1 for entry in islice(os.scandir(path), 100) if entry.name.lower().endswith(EXTENSIONS))
        more = " but images without a class" if loose else ""
        raise UserError(f"{path}: has no class folders{more}; give a folder of them, a CSV with path,label, or a folder of tars")
    names = class_names(found, known)
    if known is not None and (strange := sorted(set(names) - set(known))):
        raise UserError(f"{path}: class {strange[0]} is not in the training split; the class folders of both must have the same names")
    numbers = {name: number for number, name in enumerate(known or names)}
    items = []
    for folder, name in zip(found, names, strict=True):
        for root, below, files in os.walk(path / folder):
            below.sort()
            items += [Item(f"{root}/{file}", numbers[name]) for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
    if empty := sorted(set(names) - _present(items, known or names)):
        say(f"warning: {path}: {len(empty)} class folders without an image, such as {empty[0]}")
    return items, known or names


def _present(items: list[Item], names: list[str]) -> set[str]:
    """Names of the classes that have an image."""
    return {names[label] for label in {item.label for item in items}}


def _from_csv(path: Path, known: list[str] | None) -> tuple[list[Item], list[str] | None]:
    """Rows path,label; the label a number, or a name (or id of ImageNet) whose number is its place among the sorted names, or `known`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a CSV in UTF-8 ({error})") from None
    if rows and not {"path", "label"} <= set(rows[0]):
        raise UserError(f"{path}: needs the columns path and label, has {', '.join(map(str, rows[0]))}")
    for number, row in enumerate(rows, 2):
        if not row["path"] or not row["label"]:
            raise UserError(f"{path}: line {number} lacks a path or a label")
    labels = [row["label"].strip() for row in rows]
    names = None if all(label.isdecimal() for label in labels) else sorted(set(labels))
    if names and (odd := next((label for label in names if re.fullmatch(r"[-+]?\d+(\.\d*)?", label)), None)):
        raise UserError(f"{path}: label {odd} among names is no name, and among numbers it must be whole and from 0 up; give all labels as "
                        "class numbers, or all as names")  # fmt: skip
    numbers = {label: number for number, label in enumerate(names or ())}
    shown = class_names(names, known) if names else None
    if shown and known:
        if strange := sorted(set(shown) - set(known)):
            raise UserError(f"{path}: class {strange[0]} is not in the training split; both must have the same names")
        numbers = {label: known.index(name) for label, name in zip(names or (), shown, strict=True)}
        shown = known
    return [Item(str(path.parent / row["path"]), numbers[label] if names else int(label))
            for row, label in zip(rows, labels, strict=True)], shown  # fmt: skip


def _from_tars(path: Path, label_key: str | None) -> tuple[list[Item], list[str] | None]:
    """The samples of tars, each checked to be whole."""
    tars = sorted(path.glob("*.tar"))
    items = []
    with progress(f"read {path}", len(tars), "shards") as bar:
        for done, tar in enumerate(tars, 1):
            for record in index_tar(tar, label_key=label_key):
                items.append(Item(str(tar), int(record["label"]), int(record["offset"]), int(record["size"])))
            bar.update(done)
    return items, load_manifest(path, check_files=False).class_names if (path / MANIFEST_NAME).exists() else None


def class_names(folders: list[str], among: list[str] | None = None) -> list[str]:
    """Names for class folders: WordNet's for ids of ImageNet (n01440764: tench, Tinca tinca), else the folders' own. `among`: the names of
    the training split, which tell two classes of one name apart although this one may hold but one of them."""
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return folders
    known = imagenet_folders()
    names = [known.get(folder, folder) for folder in folders]
    twice = {name for name in names if names.count(name) > 1}  # crane, the bird and the machine
    twice |= {name for name, folder in zip(names, folders, strict=True) if f"{name} ({folder})" in (among or ())}
    return [f"{name} ({folder})" if name in twice else name for name, folder in zip(names, folders, strict=True)]


def imagenet_folders() -> dict[str, str]:
    """ImageNet's thousand classes: folder id -> names."""
    return dict(line.split("\t") for line in (Path(__file__).parent / "imagenet_classes.tsv").read_text().splitlines())


def _write(source: Source, folder: Path, split: str, seed: int, samples_per_shard: int, max_broken: float,
           processes: int | None) -> Manifest:  # fmt: skip
    """One split, shard by shard over worker processes."""
    total = len(source.items)
    largest = max(item.label for item in source.items)
    classes = len(source.classes) if source.classes else 1 + largest
    if largest >= classes:
        raise UserError(f"{source.name}: class {largest} has no name, there are {classes}; name all classes")
    if classes > 2 * (present := len({item.label for item in source.items})) + 10:
        say(f"warning: {present} of {classes} classes have an image; are the labels right?")
    about = {"name": source.name, "digest": source.digest, "shuffle_seed": seed, "class_names": source.classes}
    shards = ShardSet(folder, "image", split, classes, samples_per_shard, about)
    if shards.complete:
        say(f"{folder}: is complete")
        return shards.finish()
    order = epoch_permutation(total, seed, 0)
    count = -(-total // samples_per_shard)
    found = ((number, shards.record(number)) for number in range(count))
    records = {number: record for number, record in found if record and not record["broken"]}  # broken images may have been mended
    todo = [number for number in range(count) if number not in records]

    def jobs() -> Iterator[tuple[ShardSet, int, list[Item]]]:
        for number in todo:
            places = order[number * samples_per_shard : (number + 1) * samples_per_shard]
            yield shards, number, [source.items[place] for place in places.tolist()]

    done, broken = sum(record["read"] for record in records.values()), list[list[str]]()
    with progress(f"shard {split}", total, "images", initial=done) as bar:
        for record in in_workers(_shard, jobs(), processes or cores()):
            done += record["read"]
            broken += record["broken"]
            if len(broken) > max_broken * total:
                _report(folder, broken)
                raise UserError(f"{folder}: {len(broken)} of {done} images cannot be read, more than {max_broken:.2%} of {total}; see "
                                f"{folder / BROKEN_NAME}, mend them or raise --max-broken")  # fmt: skip
            bar.update(done, f"{len(broken)} broken" if broken else "")
    (folder / BROKEN_NAME).unlink(missing_ok=True)  # of an earlier try
    if broken:
        _report(folder, broken)
        say(f"warning: {len(broken)} of {total} images cannot be read and were left out; {folder / BROKEN_NAME} lists them")
    return shards.finish(count)


def _report(folder: Path, broken: list[list[str]]) -> None:
    """A CSV of path and reason."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([["path", "reason"], *sorted(broken)])
    write_text(folder / BROKEN_NAME, stream.getvalue())


def _shard(job: tuple[ShardSet, int, list[Item]]) -> dict[str, Any]:
    """Read, decode and write the images of one shard; in a worker."""
    shards, number, items = job
    samples, broken = [], []
    for item in items:
        try:
            samples.append(_sample(item))
        except UserError as error:
            broken.append([item.where, str(error).removeprefix(f"{item.where} ").removesuffix("; mend or remove it")])
    note = {"read": len(items), "broken": broken}
    shards.write(number, samples, note)
    return note


def _sample(item: Item) -> Sample:
    """The image's own bytes where its format is a usual one."""
    try:
        with open(item.path, "rb") as file:
            file.seek(item.offset)
            payload = file.read(item.size)
    except OSError as error:
        raise UserError(f"{item.where} cannot be read ({error.strerror})") from None
    image, form = open_image(payload, item.where), Image.open(io.BytesIO(payload)).format
    if form not in KEPT:
        stream = io.BytesIO()
        image.save(stream, "png")
        payload, form = stream.getvalue(), "PNG"
    return Sample(payload, item.label, KEPT[form])

