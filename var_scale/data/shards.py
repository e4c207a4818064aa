"""Writing folders of WebDataset shards so that a kill costs at most one shard, and adopting and checking such folders."""

from __future__ import annotations

import io
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from var_scale.data.manifest import MANIFEST_NAME, TOKEN_FIELDS, Manifest, ShardInfo, load_manifest, missing_files
from var_scale.data.tar_index import INDEX_DTYPE, PAYLOADS, index_tar, npy_header
from var_scale.errors import UserError
from var_scale.files import atomic_file, disk_errors, read_json, remove_tree, sha256_file, write_json
from var_scale.progress import progress, say

__all__ = ["INDEX_DTYPE", "ShardSetWriter", "describe_folder", "index_folder", "index_tar", "npy_bytes", "read_index", "verify_folder"]

PROGRESS_FOLDER = ".progress"


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the bytes of an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


class ShardSetWriter:
    """Writes samples 0, 1, 2, ... into shards of `samples_per_shard`, the manifest last.

    Each finished shard leaves a record in `.progress/`, so a killed run is continued by making the same writer again and
    adding the samples from `completed_samples()` on. A folder made with other settings is refused with a UserError.
    `with ShardSetWriter(...) as writer: ...; manifest = writer.finish()`.
    """

    def __init__(self, folder: Path, kind: str, split: str, num_classes: int, samples_per_shard: int, source: dict[str, Any],
                 tokens: dict[str, Any] | None = None):
        if samples_per_shard < 1 or num_classes < 1:
            raise UserError(f"{folder}: samples_per_shard {samples_per_shard} and num_classes {num_classes} must be at least 1")
        self.folder, self.kind, self.split, self.num_classes = Path(folder), kind, split, num_classes
        self.samples_per_shard, self.source, self.tokens = samples_per_shard, source, tokens
        self._settings: dict[str, Any] = {"kind": kind, "split": split, "num_classes": num_classes, "source": source, "tokens": tokens}
        self._records = self.folder / PROGRESS_FOLDER
        self._buffer: list[tuple[bytes, int, str]] = []
        self._manifest = self._existing_manifest()
        self._shards = list(self._manifest.shards) if self._manifest else self._earlier_shards()

    def _existing_manifest(self) -> Manifest | None:
        if not (self.folder / MANIFEST_NAME).exists():
            return None
        manifest = load_manifest(self.folder, check_files=False)
        self._require_same({key: getattr(manifest, key) for key in self._settings}, self._settings)
        if lost := missing_files(self.folder, manifest):
            say(f"{lost[0].split(':')[0]} is missing or cut; the shards are made again")
            (self.folder / MANIFEST_NAME).unlink()
            return None
        return manifest

    def _earlier_shards(self) -> list[ShardInfo]:
        """The complete shards of a killed run, in order; starts the records of a new run."""
        settings = {**self._settings, "samples_per_shard": self.samples_per_shard}
        path = self._records / "settings.json"
        if not (self._records / "000000.json").exists():
            write_json(path, settings)
            return []
        self._require_same(read_json(path, "record of an unfinished run"), settings)
        shards: list[ShardInfo] = []
        while (record := self._records / f"{len(shards):06d}.json").exists():
            shard = ShardInfo(**read_json(record, "record of a finished shard"))
            tar, index = self.folder / shard.name, self.folder / shard.index
            if not tar.exists() or tar.stat().st_size != shard.bytes or not index.exists():
                break
            shards.append(shard)
        return shards

    def _require_same(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        there, here = _flat(there), _flat(here)
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise UserError(f"{self.folder}: holds shards made with other settings ({key}: {there.get(key)} there, {here.get(key)} "
                                "here); remove the folder or choose another")

    @property
    def complete(self) -> bool:
        """True when an earlier run wrote the manifest with these settings: nothing is left to do."""
        return self._manifest is not None

    def completed_samples(self) -> int:
        """Samples in complete shards, from this run and earlier ones; go on adding from here."""
        return sum(shard.samples for shard in self._shards)

    def add_image(self, data: bytes, label: int, extension: str = "png") -> None:
        """Add an encoded image (`extension` png or jpg) of class `label`."""
        self._add(data, label, extension)

    def add_tokens(self, tokens: np.ndarray, label: int) -> None:
        """Add tokens (views, L) of class `label`, stored as uint16."""
        self._add(npy_bytes(tokens.astype("<u2")), label, "tok.npy")

    def _add(self, payload: bytes, label: int, extension: str) -> None:
        assert not self.complete, "this folder is complete; look at `complete` before adding"
        if not 0 <= label < self.num_classes:
            index = self.completed_samples() + len(self._buffer)
            raise UserError(f"{self.folder}: sample {index} has class {label}, outside 0..{self.num_classes - 1}; mend the labels")
        self._buffer.append((payload, int(label), extension))
        if len(self._buffer) == self.samples_per_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        """Tar under a temporary name, synced, renamed; then its index; then the record that makes it count."""
        import webdataset

        name = f"{self.split}-{len(self._shards):06d}.tar"
        first = self.completed_samples()
        # a fixed mtime makes shards equal byte for byte
        with atomic_file(self.folder / name) as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
            for number, (payload, label, extension) in enumerate(self._buffer):
                tar.write({"__key__": f"{first + number:09d}", extension: payload, "cls": str(label).encode()})
        with disk_errors(self.folder / name):
            shard = _index_shard(self.folder, name, self.kind)[0]
            write_json(self._records / f"{len(self._shards):06d}.json", asdict(shard))
        self._shards.append(shard)
        self._buffer = []

    def finish(self) -> Manifest:
        """Write the last shard and the manifest; returns the manifest."""
        if self._manifest is None:
            if self._buffer:
                self._write_shard()
            if not self._shards:
                raise UserError(f"{self.folder}: no sample was written; check the source of the data")
            self._manifest = Manifest(shards=tuple(self._shards), **self._settings)
            self._manifest.write(self.folder)
        remove_tree(self._records)
        return self._manifest

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._buffer = []


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, so that a difference can be named; tuples become lists as in JSON."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(item) if isinstance(item, tuple) else item
    return flat


def _index_shard(folder: Path, name: str, kind: str) -> tuple[ShardInfo, np.ndarray]:
    """Index the tar `name`, write NAME.idx beside it, hash both."""
    tar = folder / name
    records = index_tar(tar, kind)
    index = folder / (tar.stem + ".idx")
    with atomic_file(index) as file:
        file.write(records.tobytes())
    return ShardInfo(name, len(records), tar.stat().st_size, sha256_file(tar), index.name, sha256_file(index)), records


def read_index(folder: Path, shard: ShardInfo) -> np.ndarray:
    """The index of one shard: array (samples,) of INDEX_DTYPE."""
    return np.fromfile(Path(folder) / shard.index, dtype=INDEX_DTYPE)


def decode_image(payload: bytes, where: str) -> Image.Image:
    """An encoded image as RGB, wholly decoded. UserError that begins with `where` if it cannot be."""
    try:
        return Image.open(io.BytesIO(payload)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a readable image ({error}); mend or remove it") from None


def _decode_all(tar: Path, records: np.ndarray) -> None:
    """Decode every image of a shard, in threads (Pillow decodes outside Python's lock)."""
    mapped = np.memmap(tar, np.uint8, "r")

    def decode(number: int) -> None:
        start, size = int(records["offset"][number]), int(records["size"][number])
        decode_image(mapped[start : start + size].tobytes(), f"{tar}: sample {number} (byte {start})")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(decode, range(len(records))):
            pass


def index_folder(folder: Path, kind: str = "image", split: str = "train", num_classes: int | None = None,
                 source: dict[str, Any] | None = None, tokens: dict[str, Any] | None = None) -> Manifest:
    """Adopt anybody's WebDataset tars: decode every image, write an index beside each `*.tar` of `folder` (sorted by name) and the
    manifest.

    `num_classes` None: one more than the largest label. `tokens` is needed for kind "tokens". UserError as in `index_tar`.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.tar"))
    if kind not in PAYLOADS:
        raise UserError(f"{folder}: kind {kind!r} is not one of {', '.join(PAYLOADS)}")
    if not split:
        raise UserError(f"{folder}: the split has no name; give one such as train")
    if not names:
        raise UserError(f"{folder}: no *.tar file here; give the folder that holds the shards")
    if kind == "tokens" and sorted(tokens or ()) != sorted(TOKEN_FIELDS):
        raise UserError(f"{folder}: token shards need {', '.join(TOKEN_FIELDS)} to be indexed; give them")
    shards, largest = [], 0
    with progress(f"index {folder}", len(names), "shards") as bar:
        for done, name in enumerate(names, 1):
            shard, records = _index_shard(folder, name, kind)
            if tokens is not None:
                _check_tokens(folder / name, records, tokens)
            if kind == "image":
                _decode_all(folder / name, records)
            largest = max(largest, int(records["label"].max()))
            if num_classes is not None and largest >= num_classes:
                raise UserError(f"{folder / name}: class {largest} is outside 0..{num_classes - 1}; give the right number of classes")
            shards.append(shard)
            bar.update(done)
    manifest = Manifest(kind, split, num_classes or largest + 1, source or {"name": folder.name}, tokens, tuple(shards))
    manifest.write(folder)
    return manifest


def _check_tokens(path: Path, records: np.ndarray, tokens: dict[str, Any]) -> None:
    """The first .npy of the shard has the shape the manifest claims, and all are equally large."""
    expected = (tokens["views"], tokens["length"])
    _, shape, dtype = npy_header(path, int(records["offset"][0]))
    if shape != expected or dtype != np.dtype(tokens["dtype"]) or (records["size"] != records["size"][0]).any():
        raise UserError(f"{path}: holds {dtype} arrays {shape}, the manifest says {tokens['dtype']} {expected}; give the right shape")


def verify_folder(folder: Path) -> list[str]:
    """Every problem of a folder, a line each (none: sound): manifest, sizes, sha256, indices against the tars, images that cannot be
    decoded."""
    folder = Path(folder)
    try:
        manifest = load_manifest(folder, check_files=False)
    except UserError as error:
        return [str(error)]
    problems = missing_files(folder, manifest)
    with progress(f"verify {folder}", len(manifest.shards), "shards") as bar:
        for done, shard in enumerate(manifest.shards, 1):
            if not any(line.startswith((f"{folder / shard.name}:", f"{folder / shard.index}:")) for line in problems):
                problems += _shard_problems(folder, shard, manifest)
            bar.update(done)
    return problems


def _shard_problems(folder: Path, shard: ShardInfo, manifest: Manifest) -> list[str]:
    for name, expected in ((shard.name, shard.sha256), (shard.index, shard.index_sha256)):
        if sha256_file(folder / name) != expected:
            return [f"{folder / name}: the sha256 differs from the manifest; restore the file or make the data again"]
    try:
        records = index_tar(folder / shard.name, manifest.kind)
        if manifest.tokens is not None:
            _check_tokens(folder / shard.name, records, manifest.tokens)
        if manifest.kind == "image":
            _decode_all(folder / shard.name, records)
    except UserError as error:
        return [str(error)]
    if not np.array_equal(records, read_index(folder, shard)):
        return [f"{folder / shard.index}: does not fit {shard.name}; run `var-scale data index {folder}`"]
    if records["label"].max() >= manifest.num_classes:
        return [f"{folder / shard.name}: class {records['label'].max()} is outside 0..{manifest.num_classes - 1}"]
    return []


def describe_folder(folder: Path) -> dict[str, Any]:
    """What `var-scale data info` shows: counts, classes, sizes in bytes, tokens, source, digest."""
    manifest = load_manifest(folder)
    labels = np.concatenate([read_index(folder, shard)["label"] for shard in manifest.shards])
    counts = Counter(labels.tolist())
    return {"folder": str(folder), "kind": manifest.kind, "split": manifest.split, "samples": manifest.num_samples,
            "classes": manifest.num_classes, "classes_present": len(counts), "samples_per_class_min": min(counts.values()),
            "samples_per_class_max": max(counts.values()), "shards": len(manifest.shards),
            "bytes": sum(shard.bytes for shard in manifest.shards), "tokens": manifest.tokens, "source": manifest.source,
            "digest": manifest.digest}
