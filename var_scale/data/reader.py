"""Random access to the samples of a folder of shards."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np

from var_scale.data.manifest import Manifest, ShardInfo, load_manifest
from var_scale.data.remote import RemoteShards
from var_scale.data.shards import read_index
from var_scale.errors import UserError
from var_scale.files import sha256_file

SPARE_FILES = 256  # files that a process opens for other reasons


class ShardReader:
    """The samples of a folder: shard, offset, size and label of each, and the open tars.

    Shards are read, not memory-mapped: a truncated shard or a failing disk then raises an error
    that names the shard, instead of killing the process.

    Raises:
        UserError: the folder is incomplete, of another kind, or has more shards than a process may
            open.
    """

    def __init__(self, folder: Path | RemoteShards, kind: str):
        self.remote = folder if isinstance(folder, RemoteShards) else None
        self.folder = folder.folder if isinstance(folder, RemoteShards) else Path(folder)
        self.manifest: Manifest = (
            self.remote.manifest if self.remote else load_manifest(self.folder)
        )
        if self.manifest.kind != kind:
            raise UserError(
                f"{self.folder}: holds {self.manifest.kind} shards, but {kind} shards are needed; "
                "give another folder",
                code="data.kind",
            )
        self.num_samples, self.num_classes = self.manifest.num_samples, self.manifest.num_classes
        self.digest = self.manifest.digest
        index = np.concatenate(
            [read_index(self.folder, shard, check=True) for shard in self.manifest.shards]
        )
        sizes = [shard.samples for shard in self.manifest.shards]
        self.offsets, self.sizes = index["offset"].astype(np.int64), index["size"].astype(np.int64)
        self.labels = index["label"].astype(np.int64)
        self.shard_of = np.repeat(np.arange(len(sizes)), sizes)
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(
                f"{self.folder}: an index holds a class outside of 0 to {self.num_classes - 1}; "
                "run `var-scale data verify`",
                code="data.class-range",
            )
        self._files: dict[int, int] = {}
        # Every shard stays open, so the limit of open files is raised as far as needed and allowed.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(sizes) + SPARE_FILES > soft != resource.RLIM_INFINITY:
            if len(sizes) + SPARE_FILES > hard != resource.RLIM_INFINITY:
                raise UserError(
                    f"{self.folder}: {len(sizes)} shards, but a process may open only {hard} "
                    "files; raise `ulimit -n` or write larger shards",
                    code="data.open-files",
                )
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._opening = Lock()

    def shard(self, number: int) -> ShardInfo:
        """The entry of a shard in the manifest."""
        return self.manifest.shards[number]

    def damaged(
        self, part: int = 0, parts: int = 1, beat: Callable[[], None] = lambda: None
    ) -> list[int]:
        """The numbers of the shards `part`, `part` + `parts`, ... whose checksum differs from the
        manifest. `beat` is called after each."""
        if self.remote:  # compared when downloaded; cached shards may have changed since
            self.remote.drop_damaged()
            return []
        numbers = range(part, len(self.manifest.shards), parts)
        with ThreadPoolExecutor(2, "check") as pool:
            found = []
            for number, sound in zip(numbers, pool.map(self._sound, numbers), strict=True):
                beat()
                found += [] if sound else [number]
            return found

    def _sound(self, number: int) -> bool:
        """Whether a shard can be read and has its checksum."""
        try:
            return sha256_file(self.folder / self.shard(number).name) == self.shard(number).sha256
        except OSError:
            return False

    def read_into(self, number: int, rows: np.ndarray, starts: Sequence[int]) -> None:
        """Fill each of `rows` (B, n), contiguous in memory, with the bytes of shard `number` from
        `starts` (B,) on.

        Raises:
            UserError: the shard is truncated or cannot be read.
        """
        path = self.folder / self.shard(number).name
        try:
            with self._opening:
                if number not in self._files:
                    self._files[number] = (
                        self.remote.open(self.shard(number))
                        if self.remote
                        else os.open(path, os.O_RDONLY)
                    )
            file, whole, size = self._files[number], rows.data.cast("B"), rows[0].nbytes
            for row, start in enumerate(starts):
                if os.preadv(file, [whole[row * size : (row + 1) * size]], start) != size:
                    raise UserError(
                        f"{path}: is truncated, it ends before byte {start + size}; run `var-scale "
                        f"data verify {self.folder}`",
                        code="data.shard-truncated",
                    )
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); check the disk",
                code="data.shard-unreadable",
            ) from None

    def path(self, number: int) -> Path:
        """The file of a shard; a remote one is downloaded if it is not cached."""
        return (
            self.remote.local(self.shard(number))
            if self.remote
            else self.folder / self.shard(number).name
        )

    def by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Pairs of a shard and the positions in `indices` of its samples."""
        shards = self.shard_of[indices]
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        return zip(numbers.tolist(), np.split(order, starts[1:]), strict=False)

    def checked(self, indices: np.ndarray) -> np.ndarray:
        """The indices as int64.

        Raises:
            IndexError: one is not that of a sample.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_samples):
            raise IndexError(
                f"{self.folder}: samples {indices.min()} to {indices.max()} of {self.num_samples}"
            )
        return indices
