"""Finding the samples of a WebDataset tar, strictly.

Python's `tarfile` (and therefore `webdataset`) ends quietly at a damaged header, which turns a
damaged shard into a shorter one. `index_tar` accepts only a complete archive of complete samples.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from var_scale.data.findings import Tally
from var_scale.data.image_files import hidden
from var_scale.data.tar_samples import FIX, PAYLOADS, Wanted, apart, group, label_of
from var_scale.errors import UserError
from var_scale.files import require_content

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: byte offset and size of the payload inside the tar, and its class. 16 bytes."""

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""The first bytes of compressed files, and the command that decompresses them."""
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def tar_names(folder: Path) -> list[str]:
    """The sorted names of the tars in `folder`, without hidden files."""
    found = (path.name for path in folder.glob("*.tar") if path.is_file())
    return sorted(name for name in found if not hidden(name))


def other_archives(folder: Path) -> str:
    """Text that counts the archives in and below `folder` that are not read; empty without any."""
    archives = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.name.lower().endswith((".tar", *ARCHIVES))
        and not any(map(hidden, path.relative_to(folder).parts))
        and path.is_file()
    )
    deeper = [str(path) for path in archives if len(path.parts) > 1]
    here = [path.name for path in archives if len(path.parts) == 1]
    kinds = (
        (deeper, "in folders below, which are not searched", "give each folder"),
        ([n for n in here if n.endswith(ARCHIVES)], "not read", "decompress to a .tar file"),
        (
            [n for n in here if not n.endswith((".tar", *ARCHIVES))],
            "not read",
            "let the name end in lower case",
        ),
    )
    return ", and ".join(
        f"{len(names)} archive{'s' * (len(names) > 1)} {what}, such as {names[0]} ({cure})"
        for names, what, cure in kinds
        if names
    )


def index_tar(
    path: Path, kind: str = "image", label_key: str | None = None, unused: Tally | None = None
) -> np.ndarray:
    """Index of every sample of a WebDataset tar: array (N,) of INDEX_DTYPE.

    A sample is a series of members with one key: one payload (an image of FORMATS, or .tok.npy for
    tokens) and one .cls with an integer >= 0, or with `label_key` a .json with that field.
    Further members of a sample are ignored.

    Args:
        unused: counts the members that belong to no sample, and the images and labels that belong
            to a sample but are not its own (KEY.mask.png).

    Raises:
        UserError: names the shard and the sample. The tar is truncated, has a damaged header, no
            end-of-archive mark or bytes after it; a sample is incomplete, occurs twice, has two
            images or an invalid label; or there is no sample.
    """
    path = Path(path)
    require_content(path)
    wanted = Wanted(kind, "json" if label_key else "cls")
    records: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    unused = Tally() if unused is None else unused
    try:
        with open(path, "rb") as file:
            samples = group(path, _members(path, file), unused)
            for key, parts in samples:
                if key in seen:
                    raise apart(path, key)
                seen.add(key)
                if (payload := wanted.payload(path, key, parts, samples, unused)) is None:
                    continue
                label = label_of(path, file, parts[wanted.holder], label_key)
                records.append((payload.offset_data, payload.size, label))
    except FileNotFoundError:
        raise UserError(f"{path}: this shard does not exist", code="data.shard-missing") from None
    if not records:
        raise UserError(
            f"{path}: no {kind} sample in this shard; it needs members with a common key, such as "
            f"KEY.{PAYLOADS[kind][0]} and KEY.{wanted.holder}",
            code="data.no-samples",
        )
    return np.array(records, dtype=INDEX_DTYPE)


def _members(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The regular files and links of a tar; returns only after a complete end-of-archive mark."""
    total = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                if member.offset_data + member.size > total and member.isreg():
                    raise tarfile.ReadError(f"truncated inside {member.name}")
                if member.issparse() or member.type == tarfile.CONTTYPE:
                    raise UserError(
                        f"{path}: {member.name} is a sparse member, which cannot be indexed; write "
                        "the tar without --sparse",
                        code="data.tar-sparse",
                    )
                if member.isreg() or member.islnk() or member.issym():
                    yield member
                # tarfile keeps every member otherwise.
                tar.members = []  # type: ignore[attr-defined]
            end = tar.offset
    except tarfile.TarError as error:
        _refuse_compressed(path, file)
        raise UserError(
            f"{path}: is not a complete tar ({error}; {total} bytes); {FIX}",
            code="data.tar-damaged",
        ) from None
    _check_end(path, file, end)


def _check_end(path: Path, file: IO[bytes], end: int) -> None:
    """`tarfile` stops at the first block that is not a header: from there on, two or more blocks of
    zeros must follow, and nothing else."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block.count(0) != len(block):
        problem = f"damaged header at byte {end}"
    elif len(block + file.read(tarfile.BLOCKSIZE)) < 2 * tarfile.BLOCKSIZE:
        problem = f"the end-of-archive mark at byte {end} is missing or truncated"
    else:
        file.seek(end)
        while (rest := file.read(1 << 20)) and rest.count(0) == len(rest):
            pass
        problem = "data after the end-of-archive mark; were tars concatenated?" if rest else ""
    if problem:
        raise UserError(
            f"{path}: is not a complete tar ({problem}); {FIX}", code="data.tar-damaged"
        )


def _refuse_compressed(path: Path, file: IO[bytes]) -> None:
    """Raise an error if a file that is no tar is compressed."""
    file.seek(0)
    start = file.read(8)
    tool = next((tool for magic, tool in COMPRESSED.items() if start.startswith(magic)), None)
    if tool:
        raise UserError(
            f"{path}: is compressed with {tool}, so samples cannot be read by their place; "
            f"decompress it: {tool} -dc {path.name} > NEW.tar",
            code="data.tar-compressed",
        )
    if start.startswith(b"PK"):
        raise UserError(
            f"{path}: is a zip archive; unpack it and pack it as a tar, sorted by name "
            "(tar --sort=name)",
            code="data.tar-compressed",
        )


def npy_header(path: Path, offset: int) -> tuple[int, tuple[int, ...], np.dtype]:
    """(header bytes, shape, dtype) of the .npy member whose data starts at byte `offset` of a tar.

    Raises:
        UserError: the member is not an .npy array.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        stream = io.BytesIO(file.read(1024))
    try:
        shape, _, dtype = read_npy_header(stream)
    except ValueError:
        raise UserError(
            f"{path}: the member at byte {offset} is not an .npy array; {FIX}", code="data.not-npy"
        ) from None
    return stream.tell(), shape, dtype


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the order is Fortran's, dtype) of an .npy file, whose data follow.

    Raises:
        ValueError: it is another file.
    """
    one = np.lib.format.read_magic(stream) == (1, 0)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
    return read(stream)  # type: ignore[arg-type, no-any-return]
