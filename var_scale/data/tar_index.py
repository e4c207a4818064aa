"""Finding the samples of a WebDataset tar, strictly.

Python's `tarfile` (and so `webdataset`) ends quietly at a bad header, which turns a damaged shard into a shorter one. Here
the archive is walked header by header and anything but a whole archive of whole samples is refused.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from var_scale.errors import UserError

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: byte offset and size of the payload inside the tar, and its class. 16 bytes."""

PAYLOADS = {"image": ("png", "jpg", "jpeg", "webp"), "tokens": ("tok.npy",)}
BLOCK = 512
MEND = "copy the shard again or write it anew"


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar: name, offset of its data, size in bytes."""

    name: str
    offset: int
    size: int


def index_tar(path: Path, kind: str = "image", label_key: str | None = None) -> np.ndarray:
    """Index of every sample of a WebDataset tar: array (N,) of INDEX_DTYPE.

    A sample is a run of members with one key: one payload (PNG/JPEG/WebP for images, .tok.npy for tokens) and one .cls holding an
    integer >= 0, or with `label_key` a .json with that field; other members are passed over. UserError, naming the shard and sample: cut
    short, bad checksum, no end-of-archive mark, bytes after it, half a sample, a key twice, a bad label, no sample at all.
    """
    path = Path(path)
    records: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    try:
        with open(path, "rb") as file:
            for key, parts in _samples(_members(path, file)):
                if key in seen:
                    raise UserError(f"{path}: the members of sample {key} are not side by side or come twice; {MEND}")
                seen.add(key)
                record = _record(path, file, kind, key, parts, label_key)
                if record is not None:
                    records.append(record)
    except FileNotFoundError:
        raise UserError(f"{path}: this shard does not exist") from None
    if not records:
        raise UserError(f"{path}: no {kind} sample in this shard; it needs members with one key, such as KEY.{PAYLOADS[kind][0]} and "
                        "KEY.cls")
    return np.array(records, dtype=INDEX_DTYPE)


def _members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Walk the headers; returns only after a complete end-of-archive mark."""
    total = os.fstat(file.fileno()).st_size
    offset, long_name = 0, ""
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) == BLOCK and not any(header):
            return _check_end(path, file)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(f"{path}: not a whole tar ({error} at byte {offset} of {total}); {MEND}") from None
        data = offset + BLOCK
        if info.type not in tarfile.REGULAR_TYPES and info.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            info.size = 0 if info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK) else info.size
        if data + info.size > total:
            raise UserError(f"{path}: cut short inside {long_name or info.name} ({total} bytes, {data + info.size} needed); {MEND}")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = file.read(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            long_name = _pax_path(file.read(info.size))
        elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            pass
        else:
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield Member(long_name or info.name, data, info.size)
            elif info.type in tarfile.REGULAR_TYPES:
                raise UserError(f"{path}: {info.name} is a sparse member, which cannot be indexed; write the tar without --sparse")
            long_name = ""
        offset = data + -(-info.size // BLOCK) * BLOCK


def _check_end(path: Path, file: BinaryIO) -> None:
    """The first zero block was read: a second must follow, and then nothing but zeros."""
    second = file.read(BLOCK)
    if len(second) < BLOCK:
        raise UserError(f"{path}: the end-of-archive mark is cut short; {MEND}")
    rest = second
    while rest:
        if rest.count(0) != len(rest):
            raise UserError(f"{path}: data after the end-of-archive mark (tars joined together?); {MEND}")
        rest = file.read(1 << 20)


def _pax_path(data: bytes) -> str:
    """The `path` record of a pax header, "" if there is none."""
    while data:
        length = int(data.split(b" ", 1)[0])
        keyword, _, value = data[:length].split(b" ", 1)[1].partition(b"=")
        if keyword == b"path":
            return value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        data = data[length:]
    return ""


def _samples(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group neighbouring members by key (the name up to the first dot of its last part), as WebDataset does."""
    current = ""
    parts: dict[str, Member] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = folder + slash + stem
        if not extension or base.startswith("."):
            continue
        if key != current:
            if parts:
                yield current, parts
            current, parts = key, {}
        parts[extension.lower()] = member
    if parts:
        yield current, parts


def _record(
    path: Path, file: BinaryIO, kind: str, key: str, parts: dict[str, Member], label_key: str | None
) -> tuple[int, int, int] | None:
    """(offset, size, label) of one sample; None if it holds neither payload nor label."""
    payload = next((parts[extension] for extension in PAYLOADS[kind] if extension in parts), None)
    holder = "json" if label_key else "cls"
    if payload is None and holder not in parts:
        return None
    if payload is None or holder not in parts:
        there, lacking = (holder, PAYLOADS[kind][0]) if payload is None else (payload.name.rpartition(".")[2], holder)
        mend = "; where its class is a field of a .json, name it with --label-key" if lacking == "cls" and "json" in parts else f"; {MEND}"
        raise UserError(f"{path}: half a sample: {key} has .{there} but no .{lacking}{mend}")
    file.seek(parts[holder].offset)
    text = file.read(min(parts[holder].size, 1 << 20 if label_key else 32))
    try:
        label = int(json.loads(text)[label_key] if label_key else text)
    except (ValueError, KeyError, TypeError):
        label = -1
    if not 0 <= label < 2**31:
        what = f"has no class number in {label_key}" if label_key else f"holds {text[:20]!r}, which is not a class number"
        raise UserError(f"{path}: {key}.{holder} {what}; write an integer from 0 up")
    return payload.offset, payload.size, label


def npy_header(path: Path, offset: int) -> tuple[int, tuple[int, ...], np.dtype]:
    """(header bytes, shape, dtype) of the .npy member whose data starts at byte `offset` of the tar `path`."""
    with open(path, "rb") as file:
        file.seek(offset)
        stream = io.BytesIO(file.read(1024))
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError:
        raise UserError(f"{path}: the member at byte {offset} is not an .npy array; {MEND}") from None
    return stream.tell(), shape, dtype
