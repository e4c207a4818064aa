"""Which files are images: one rule for every command that searches folders or tars."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from var_scale.errors import UserError
from var_scale.progress import say

HEIF = ("heic", "heif", "hif")
"""Read only if the package pillow-heif is installed; `images.py` registers it."""
PILLOW = (
    "jpg jpeg jpe jfif mpo png apng webp avif avifs jp2 j2k j2c jpc jpf jpx gif "
    "tif tiff bmp dib ppm pgm pbm pnm pfm tga icb vda vst qoi psd pcx dcx dds "
    "sgi rgb rgba bw ras ico icns cur im msp xbm xpm fit fits pcd pxr blp ftc ftu"
)
"""Formats of pixels that Pillow reads. Pillow is not asked, because what belongs to a data set must
not depend on its build. EPS, WMF, HDF5 and MPEG are missing, as they need other programs."""
FORMATS = (*PILLOW.split(), *(HEIF if find_spec("pillow_heif") else ()))
"""Extensions of images, in lower case and without a dot."""
EXTENSIONS = tuple(f".{name}" for name in FORMATS)
SYSTEM = frozenset(
    (
        *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
"""Names of files and folders that operating systems add, in lower case."""


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def subfolders(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`, and of links to folders, without hidden ones."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not hidden(entry.name) and _kind(entry) == "folder"
    )


def walk_images(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    """The paths of the images in `folder` and below, sorted within each folder, files first.

    Hidden files and folders are ignored, and links to folders are followed. A broken link with the
    name of an image is an image too, so that reading it reports it.

    Args:
        left_out: counts all other files by extension.

    Raises:
        UserError: a link leads to a folder that contains it (code `data.link-loop`).
    """
    parents = {*folder.absolute().parents, *folder.resolve().parents}
    yield from _walk(str(folder), frozenset(map(_identity, parents)), left_out)


def _walk(folder: str, above: frozenset[tuple[int, int]], left_out: Counter[str]) -> Iterator[str]:
    """`walk_images` below the folders `above`."""
    identity = _identity(folder)
    if identity in above:
        raise UserError(
            f"{folder}: this link leads back to {os.path.realpath(folder)}, which contains it; "
            "remove the link",
            code="data.link-loop",
        )
    below = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if hidden(entry.name):
            continue
        kind = _kind(entry)
        if kind == "folder":
            below.append(entry.path)
        elif not entry.name.lower().endswith(EXTENSIONS):
            left_out[os.path.splitext(entry.name)[1].lower() or "without extension"] += 1
        elif kind == "other":  # reading a pipe would wait forever
            left_out["that are no regular files"] += 1
        else:
            yield entry.path
    for path in below:
        yield from _walk(path, above | {identity}, left_out)


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "other"]:
    """What an entry is, or what its link leads to; a broken link is a file. Only links need further
    system calls, which are slow on network disks."""
    if not entry.is_symlink():
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    if os.path.isdir(entry.path):
        return "folder"
    return "file" if os.path.isfile(entry.path) or not os.path.exists(entry.path) else "other"


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and number of a folder, whatever path leads to it."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def say_left_out(where: Path, left_out: Counter[str]) -> None:
    """Print one line that counts the files that are no readable images, if there are any."""
    if left_out:
        count = sum(left_out.values())
        say(f"{where}: {count} file{'s' * (count > 1)} not read as images: {describe(left_out)}")


def describe(left_out: Counter[str]) -> str:
    """The counts as text, such as 3 .heic (need the package pillow-heif), 1 .txt."""
    return ", ".join(
        f"{count} {kind}" + " (need the package pillow-heif)" * (kind[1:] in HEIF)
        for kind, count in left_out.most_common()
    )
