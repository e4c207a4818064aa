"""Finding the images of a source: class folders, a CSV, or existing tars."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from var_scale.data.findings import Findings, say_from_one
from var_scale.data.image_files import (
    EXTENSIONS,
    describe,
    hidden,
    say_left_out,
    subfolders,
    walk_images,
)
from var_scale.data.manifest import MANIFEST_NAME, load_manifest
from var_scale.data.tar_index import index_tar, other_archives, tar_names
from var_scale.errors import UserError
from var_scale.files import canonical_hash, csv_rows, require_content
from var_scale.progress import progress, say

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split of a folder of this name, in lower case."""


@dataclass(frozen=True)
class Item:
    """One image, a file or `size` bytes from `offset` of a tar, and its class."""

    path: str
    label: int
    offset: int = 0
    size: int = -1

    @property
    def where(self) -> str:
        """The place of the image, for messages."""
        return self.path if self.size < 0 else f"{self.path} (byte {self.offset})"


@dataclass(frozen=True)
class Source:
    """The images of one split, in an order that depends only on their names."""

    items: list[Item]
    classes: list[str] | None
    """names by class number, if known"""
    name: str
    digest: str
    """hash of all names and classes"""


def read_source(
    path: Path,
    classes: list[str] | None = None,
    name: str = "",
    label_key: str | None = None,
) -> Source:
    """Find the images of a source.

    Args:
        classes: names of the training split; other splits may have only these.
        name: of the data set; by default that of the folder or file.
        label_key: see `shard_images`.

    Raises:
        UserError: there is nothing to read, or a label is wrong.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        items, names = _from_csv(path, classes)
    elif not path.is_dir():
        wrong = "is no folder or .csv file" if path.exists() else "does not exist"
        raise UserError(
            f"{path}: {wrong}; give a folder of class folders, a CSV with path,label, or a folder "
            "of tars",
            code="data.no-source",
        )
    else:
        tars = tar_names(path)
        folders = subfolders(path)
        if tars and folders:
            say(f"{path}: {len(tars)} tar{'s' * (len(tars) > 1)} beside the class folders, ignored")
        items, names = (
            _from_tars(path, label_key) if tars and not folders else _from_folders(path, classes)
        )
    if not items:
        raise UserError(f"{path}: lists no image; give a source with images", code="data.no-images")
    identity = [
        [
            os.path.relpath(item.path, path if path.is_dir() else path.parent),
            item.offset,
            item.label,
        ]
        for item in items
    ]
    return Source(items, names, name or path.resolve().stem, canonical_hash(identity))


def find_splits(source: Path) -> dict[str, Path]:
    """The folders of the splits train, val and test, in this order; empty if `source` is one split.

    Raises:
        UserError: two folders are the same split, or the training split is missing.
    """
    names = subfolders(source)
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in names:
        if name.lower() in SPLITS:
            found[SPLITS[name.lower()]].append(name)
    others = [name for name in names if name.lower() not in SPLITS]
    splits = {split: source / below[0] for split, below in found.items() if below}
    if "train" not in splits:
        if others or not names or not all(map(_holds_data, splits.values())):
            return {}
        raise UserError(
            f"{source}: has {' and '.join(names)} but no train; give one of these folders as "
            "SOURCE, with --split",
            code="data.split-name",
        )
    if others and not _holds_data(splits["train"]):
        return {}  # the class of a vehicle
    if twice := next((below for below in found.values() if len(below) > 1), None):
        raise UserError(
            f"{source}: the folders {' and '.join(twice)} are the same split; keep one of them",
            code="data.split-twice",
        )
    if others:
        say(f"{source}: folders that are no split are ignored: {', '.join(others)}")
    return splits


def _holds_data(split: Path) -> bool:
    """Whether a folder has class folders or tars, as a split has."""
    return bool(subfolders(split)) or bool(tar_names(split))


def _from_folders(path: Path, known: list[str] | None) -> tuple[list[Item], list[str]]:
    """The images of class folders, numbered in the order of their names as by torchvision's
    ImageFolder."""
    found = subfolders(path)
    loose = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.name.lower().endswith(EXTENSIONS)
        and entry.name not in found
        and not hidden(entry.name)
    )
    if not found:
        more = f" but images without a class, such as {loose[0]}" if loose else ""
        if others := other_archives(path):
            more = f" but {others}"
        raise UserError(
            f"{path}: has no class folders{more}; give a folder of them, a CSV with path,label, or "
            "a folder of tars",
            code="data.no-class-folders",
        )
    names = class_names(found, known)
    if known is not None and (strange := sorted(set(names) - set(known))):
        raise UserError(
            f"{path}: class {strange[0]} is not in the training split; the class folders of both "
            "must have the same names",
            code="data.class-unknown",
        )
    numbers = {name: number for number, name in enumerate(known or names)}
    left_out = Counter[str]()
    items = [
        Item(file, numbers[name])
        for folder, name in zip(found, names, strict=True)
        for file in walk_images(path / folder, left_out)
    ]
    if not items:
        more = f", only {describe(left_out)}" if left_out else ""
        raise UserError(
            f"{path}: no image in its folders{more}; give folders with images",
            code="data.no-images",
        )
    say_left_out(path, left_out)
    if dead := sorted(e.name for e in os.scandir(path) if not os.path.exists(e.path)):
        say(f"warning: {path}: ignored links that lead nowhere: {', '.join(dead)}")
    if loose:
        say(
            f"warning: {path}: left out {len(loose)} image{'s' * (len(loose) > 1)} beside the "
            f"class folders, such as {loose[0]}"
        )
    if empty := sorted(set(names) - _present(items, known or names)):
        say(f"warning: {path}: {len(empty)} class folders have no image, such as {empty[0]}")
    return items, known or names


def _present(items: list[Item], names: list[str]) -> set[str]:
    """Names of the classes that have an image."""
    return {names[label] for label in {item.label for item in items}}


def _from_csv(path: Path, known: list[str] | None) -> tuple[list[Item], list[str] | None]:
    """The images of a CSV with path,label.

    A label is a number, or a name (or ImageNet id) whose number is its place among the sorted names
    or in `known`.
    """
    require_content(path)
    try:
        columns, rows = csv_rows(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not a CSV in UTF-8 ({error})", code="data.csv-invalid"
        ) from None
    if not {"path", "label"} <= set(columns):
        raise UserError(
            f"{path}: needs the columns path and label, but has {', '.join(columns) or 'none'}",
            code="data.csv-invalid",
        )
    for number, row in rows:
        if not row["path"] or not row["label"]:
            raise UserError(
                f"{path}: line {number} lacks a path or a label", code="data.csv-invalid"
            )
    labels = [row["label"].strip() for _, row in rows]
    names = None if all(label.isdecimal() for label in labels) else sorted(set(labels))
    if names and (
        odd := next((label for label in names if re.fullmatch(r"[-+]?\d+(\.\d*)?", label)), None)
    ):
        raise UserError(
            f"{path}: label {odd} is a number among names, or not a whole number from 0 up; give "
            "all labels as class numbers, or all as names",
            code="data.csv-labels",
        )
    numbers = {label: number for number, label in enumerate(names or ())}
    if names is None:
        found = [int(label) for label in labels]
        say_from_one(path, min(found, default=0), max(found, default=0))
    shown = class_names(names, known) if names else None
    if shown and known:
        if strange := sorted(set(shown) - set(known)):
            raise UserError(
                f"{path}: class {strange[0]} is not in the training split; both must have the same "
                "names",
                code="data.class-unknown",
            )
        numbers = {label: known.index(name) for label, name in zip(names or (), shown, strict=True)}
        shown = known
    return [
        Item(str(path.parent / row["path"]), numbers[label] if names else int(label))
        for (_, row), label in zip(rows, labels, strict=True)
    ], shown


def _from_tars(path: Path, label_key: str | None) -> tuple[list[Item], list[str] | None]:
    """The samples of tars, each of which is checked to be complete."""
    tars = [path / name for name in tar_names(path)]
    if others := other_archives(path):
        say(f"warning: {path}: has {others}")
    items, findings = [], Findings()
    with progress(f"read {path}", len(tars), "shards") as bar:
        for done, tar in enumerate(tars, 1):
            for record in index_tar(tar, label_key=label_key, unused=findings.unused):
                items.append(
                    Item(str(tar), int(record["label"]), int(record["offset"]), int(record["size"]))
                )
            bar.update(done)
    findings.say(path)
    found = [item.label for item in items]
    say_from_one(path, min(found), max(found))
    named = (path / MANIFEST_NAME).exists()
    return items, load_manifest(path, check_files=False).class_names if named else None


def class_names(folders: list[str], among: list[str] | None = None) -> list[str]:
    """Names of class folders: those of WordNet for ImageNet ids (n01440764: tench, Tinca tinca),
    otherwise the names of the folders.

    `among` are the names of the training split. Two classes may have the same WordNet name; their
    ids then distinguish them, also if this split has only one of them.
    """
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return folders
    known = imagenet_folders()
    names = [known.get(folder, folder) for folder in folders]
    twice = {name for name in names if names.count(name) > 1}  # crane is a bird and a machine
    twice |= {
        name
        for name, folder in zip(names, folders, strict=True)
        if f"{name} ({folder})" in (among or ())
    }
    return [
        f"{name} ({folder})" if name in twice else name
        for name, folder in zip(names, folders, strict=True)
    ]


def imagenet_folders() -> dict[str, str]:
    """The thousand classes of ImageNet: folder id to names."""
    return dict(
        line.split("\t")
        for line in (Path(__file__).parent / "imagenet_classes.tsv").read_text().splitlines()
    )
