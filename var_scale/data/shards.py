"""Writing folders of WebDataset shards so that a kill costs at most one shard."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from var_scale.data.findings import Tally
from var_scale.data.manifest import (
    CHANGED,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    load_manifest,
    lost_files,
)
from var_scale.data.tar_index import INDEX_DTYPE, index_tar
from var_scale.errors import UserError
from var_scale.files import (
    atomic_file,
    disk_errors,
    first_difference,
    read_json,
    remove_tree,
    sha256_file,
    write_json,
)
from var_scale.progress import say

PROGRESS_FOLDER = ".progress"


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of `array` as an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(
        stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False
    )
    return stream.getvalue()


@dataclass(frozen=True)
class Sample:
    """An encoded image or token array, its class, and the extension of its tar member."""

    payload: bytes
    label: int
    extension: str


def token_sample(tokens: np.ndarray, label: int) -> Sample:
    """A sample of tokens (views, L) of class `label`, stored as uint16."""
    return Sample(npy_bytes(tokens.astype("<u2")), int(label), "tok.npy")


class ShardSet:
    """A folder of shards while it is written: in any order and by several processes, the manifest
    last.

    Each finished shard leaves a record in `.progress/`, so a killed run continues by writing the
    shards without a `record`.

    Raises:
        UserError: the folder holds shards with other settings.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        split: str,
        num_classes: int,
        samples_per_shard: int,
        source: dict[str, Any],
        tokens: dict[str, Any] | None = None,
    ):
        if samples_per_shard < 1 or num_classes < 1:
            raise UserError(
                f"{folder}: samples_per_shard {samples_per_shard} and num_classes {num_classes} "
                "must be at least 1",
                code="data.shard-settings",
            )
        self.folder, self.kind, self.split = Path(folder), kind, split
        self.num_classes = num_classes
        self.samples_per_shard, self.source, self.tokens = samples_per_shard, source, tokens
        self._settings: dict[str, Any] = {
            "kind": kind,
            "split": split,
            "num_classes": num_classes,
            "source": source,
            "tokens": tokens,
        }
        self._manifest = self._existing_manifest()
        if self._manifest is None:
            self._begin()

    @property
    def complete(self) -> bool:
        """Whether the manifest with these settings exists, so that nothing is left to do."""
        return self._manifest is not None

    def _existing_manifest(self) -> Manifest | None:
        """The manifest of a complete folder; one whose files are damaged is removed."""
        if not (self.folder / MANIFEST_NAME).exists():
            return None
        manifest = load_manifest(self.folder, check_files=False)
        self._require_same({key: getattr(manifest, key) for key in self._settings}, self._settings)
        for shard in manifest.shards:
            for path in lost_files(self.folder, manifest, shard):
                say(f"{path} is missing or truncated; the shards are rewritten")
                (self.folder / MANIFEST_NAME).unlink()
                return None
        return manifest

    def _begin(self) -> None:
        """Start the records, or continue those of a killed run."""
        # It imports torch: seconds, which every forked worker would take again.
        import webdataset  # noqa: F401

        settings = {**self._settings, "samples_per_shard": self.samples_per_shard}
        path = self.folder / PROGRESS_FOLDER / "settings.json"
        if any(path.parent.glob("[0-9]*.json")):
            self._require_same(read_json(path, "record of an unfinished run"), settings)
        else:
            write_json(path, settings)

    def _require_same(self, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
        if changed := first_difference(existing, wanted):
            key, before, now = changed
            raise UserError(
                f"{self.folder}: holds shards with other settings ({key} was {before!s:.80} and is "
                f"now {now!s:.80}); remove the folder or choose another",
                code="data.other-settings",
            )

    def _record(self, number: int) -> Path:
        return self.folder / PROGRESS_FOLDER / f"{number:06d}.json"

    def record(self, number: int) -> dict[str, Any] | None:
        """The note and the `ShardInfo` fields of shard `number`; None if it is not complete."""
        if not self._record(number).exists():
            return None
        record = dict(read_json(self._record(number), "record of a finished shard"))
        if record["samples"]:
            tar, index = self.folder / record["name"], self.folder / record["index"]
            if not tar.exists() or tar.stat().st_size != record["bytes"] or not index.exists():
                return None
        return record

    def write(
        self, number: int, samples: Sequence[Sample], note: dict[str, Any] | None = None
    ) -> None:
        """Write shard `number`: its tar, its index, and last the record with `note` that makes it
        count.

        Without samples only the record is written, and the folder has no such shard.
        """
        import webdataset

        name, first = f"{self.split}-{number:06d}.tar", number * self.samples_per_shard
        for place, sample in enumerate(samples):
            self._check(sample, first + place)
        shard = ShardInfo(name, 0, 0, "", "", "")
        if samples:
            # With a fixed mtime, equal samples give equal bytes.
            with (
                atomic_file(self.folder / name) as file,
                webdataset.TarWriter(file, mtime=0, encoder=False) as tar,
            ):
                for place, sample in enumerate(samples):
                    key = f"{first + place:09d}"
                    tar.write(
                        {
                            "__key__": key,
                            sample.extension: sample.payload,
                            "cls": str(sample.label).encode(),
                        }
                    )
            with disk_errors(self.folder / name):
                shard = index_shard(self.folder, name, self.kind)[0]
        write_json(self._record(number), {**(note or {}), **asdict(shard)})

    def _check(self, sample: Sample, place: int) -> None:
        if not 0 <= sample.label < self.num_classes:
            raise UserError(
                f"{self.folder}: sample {place} has class {sample.label}, outside of 0 to "
                f"{self.num_classes - 1}; fix the labels",
                code="data.class-range",
            )

    def finish(self, count: int | None = None) -> Manifest:
        """Write the manifest of the finished shards, which must be `count` if that is given.

        Raises:
            UserError: a shard is missing, or no sample was written.
        """
        if self._manifest is None:
            shards, number = [], 0
            while (record := self.record(number)) is not None:
                if record["samples"]:
                    shards.append(ShardInfo.of(record))
                number += 1
            if count is not None and number < count:
                raise UserError(
                    f"{self.folder}: shard {number} of {count} is missing; run the same command "
                    "again, it continues",
                    code="data.shard-missing",
                )
            if not shards:
                raise UserError(
                    f"{self.folder}: no sample was written; check the source of the data",
                    code="data.no-samples",
                )
            self._manifest = Manifest(shards=tuple(shards), **self._settings)
            self._manifest.write(self.folder)
        remove_tree(self.folder / PROGRESS_FOLDER)
        # Left by a process that was killed while it wrote.
        for left_over in self.folder.glob(f".{self.split}-*.tmp"):
            left_over.unlink()
        return self._manifest


class ShardSetWriter(ShardSet):
    """Writes samples 0, 1, 2, ... in order; after a kill, continue from `completed_samples()`.

    `with ShardSetWriter(...) as writer: ...; manifest = writer.finish()`.
    """

    def __init__(self, *settings: Any, **more: Any):
        """The arguments of ShardSet."""
        super().__init__(*settings, **more)
        self._buffer: list[Sample] = []
        self._number = self._done = 0
        while not self.complete and (record := self.record(self._number)) is not None:
            self._number, self._done = self._number + 1, self._done + record["samples"]

    def completed_samples(self) -> int:
        """Number of samples in complete shards, of this run and earlier ones."""
        return self._manifest.num_samples if self._manifest else self._done

    def add_image(self, data: bytes, label: int) -> None:
        """Add a PNG of class `label`."""
        self.add(Sample(data, int(label), "png"))

    def add(self, sample: Sample) -> None:
        """Add a sample; it is written with its shard."""
        assert not self.complete, "this folder is complete; check `complete` before adding"
        self._check(sample, self._done + len(self._buffer))
        self._buffer.append(sample)
        if len(self._buffer) == self.samples_per_shard:
            self._write_shard()

    def _write_shard(self) -> None:
        self.write(self._number, self._buffer)
        self._number, self._done = self._number + 1, self._done + len(self._buffer)
        self._buffer = []

    def finish(self, count: int | None = None) -> Manifest:
        """Write the last shard and the manifest; returns the manifest."""
        if self._buffer:
            self._write_shard()
        return super().finish(count)

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._buffer = []


def index_shard(
    folder: Path,
    name: str,
    kind: str,
    label_key: str | None = None,
    unused: Tally | None = None,
) -> tuple[ShardInfo, np.ndarray]:
    """Index the tar `name`, write NAME.idx beside it, and compute the checksums of both.

    `label_key` and `unused` as in `index_tar`.
    """
    tar = folder / name
    records = index_tar(tar, kind, label_key, unused)
    index = folder / (tar.stem + ".idx")
    with atomic_file(index) as file:
        file.write(records.tobytes())
    return ShardInfo(
        name, len(records), tar.stat().st_size, sha256_file(tar), index.name, sha256_file(index)
    ), records


def read_index(folder: Path, shard: ShardInfo, check: bool = False) -> np.ndarray:
    """The index of one shard: array (samples,) of INDEX_DTYPE.

    Raises:
        UserError: with `check`, its checksum differs from the manifest.
    """
    path = Path(folder) / shard.index
    content = path.read_bytes()
    if check and hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise UserError(f"{path}: {CHANGED}", code="data.index-changed")
    return np.frombuffer(content, dtype=INDEX_DTYPE)
