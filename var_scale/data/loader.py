"""Token batches for training: which samples a step takes, and reading them ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from var_scale.data.order import epoch_views, global_batch_indices, rank_slice
from var_scale.data.reader import ShardReader
from var_scale.data.remote import RemoteShards
from var_scale.data.tar_index import npy_header
from var_scale.errors import UserError
from var_scale.scales import PatchNum, normal


class TokenData(ShardReader):
    """Token shards with random access.

    Raises:
        UserError: the folder holds no token shards, or they come from another tokenizer than
            `expect_tokenizer_hash` or have other grids than `expect_patch_nums`.
    """

    def __init__(
        self,
        folder: Path | RemoteShards,
        expect_tokenizer_hash: str | None = None,
        expect_patch_nums: Sequence[PatchNum] | None = None,
    ):
        super().__init__(folder, "tokens")
        tokens = self.manifest.tokens
        assert tokens is not None
        self.views, self.length = int(tokens["views"]), int(tokens["length"])
        self.vocab_size = int(tokens["vocab_size"])
        self.patch_nums = normal(tokens["patch_nums"])
        self.tokenizer_hash = str(tokens["tokenizer_hash"])
        if expect_tokenizer_hash is not None and expect_tokenizer_hash != self.tokenizer_hash:
            raise UserError(
                f"tokens in {folder} come from tokenizer {self.tokenizer_hash[:12]}, but this run "
                f"uses {expect_tokenizer_hash[:12]}; encode the images again into another folder, "
                "with `var-scale data tokenize`",
                code="data.other-tokenizer",
            )
        if expect_patch_nums is not None and normal(expect_patch_nums) != self.patch_nums:
            raise UserError(
                f"tokens in {folder} have patch_nums {self.patch_nums}, but this run uses "
                f"{normal(expect_patch_nums)}; change tokenizer.patch_nums, or encode the images "
                "again into another folder, with `var-scale data tokenize`",
                code="data.other-patch-nums",
            )
        self._first_token = self._locate()

    def _locate(self) -> np.ndarray:
        """Byte position of the first token of each sample in its shard: int64 (N,)."""
        body = 2 * self.views * self.length
        path = self.path(0)
        header, shape, dtype = npy_header(path, int(self.offsets[0]))
        if (
            shape != (self.views, self.length)
            or dtype != np.dtype("<u2")
            or header + body != self.sizes[0]
        ):
            raise UserError(
                f"{path}: holds {dtype} {shape}, but the manifest has uint16 "
                f"{(self.views, self.length)}; write it again",
                code="data.token-shape",
            )
        if (self.sizes != self.sizes[0]).any():
            raise UserError(
                f"{self.folder}: samples have different sizes; write the tokens again",
                code="data.token-shape",
            )
        return self.offsets + self.sizes - body

    def gather(
        self, indices: np.ndarray, views: np.ndarray | int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 (B, L) and labels int64 (B,) of samples `indices` (B,).

        `views` is (B,), or one view for all samples.
        """
        indices = self.checked(indices)
        first = self._first_token[indices] + np.asarray(views, dtype=np.int64) * (2 * self.length)
        tokens_BL = np.empty((len(indices), self.length), dtype=np.int64)
        for number, positions in self.by_shard(indices):
            rows = np.empty((len(positions), self.length), dtype="<u2")
            self.read_into(number, rows, first[positions].tolist())
            tokens_BL[positions] = rows
        return tokens_BL, self.labels[indices]


@dataclass(frozen=True)
class Batch:
    """Tokens int64 (B, L), labels int64 (B,), and positions (B,) of the samples in the endless
    stream."""

    tokens_BL: np.ndarray
    labels_B: np.ndarray
    sample_positions_B: np.ndarray


class Loader:
    """Which samples one data-parallel rank takes in (step, micro-step): a pure function of data,
    seed and step, without state."""

    def __init__(
        self,
        num_samples: int,
        seed: int,
        global_batch: int,
        world: int,
        rank: int,
        accumulate: int,
        subset: np.ndarray | None,
    ):
        rank_slice(global_batch, world, rank, accumulate, 0)  # raises if the batch does not divide
        self.num_samples = num_samples if subset is None else len(subset)
        self.seed, self.global_batch, self.subset = seed, global_batch, subset
        self.world, self.rank, self.accumulate = world, rank, accumulate

    def places(self, step: int, micro_index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample indices, epochs, and positions in the stream, each (B,)."""
        part = rank_slice(self.global_batch, self.world, self.rank, self.accumulate, micro_index)
        indices, epochs = (
            array[part]
            for array in global_batch_indices(self.num_samples, self.seed, step, self.global_batch)
        )
        indices = indices if self.subset is None else self.subset[indices]
        positions = np.arange(part.start, part.stop, dtype=np.int64) + step * self.global_batch
        return indices, epochs, positions


class TokenLoader(Loader):
    """The token batches of one data-parallel rank; with `subset`, of these samples only."""

    def __init__(
        self,
        data: TokenData,
        seed: int,
        global_batch: int,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        subset: np.ndarray | None = None,
    ):
        super().__init__(data.num_samples, seed, global_batch, world, rank, accumulate, subset)
        self.data = data

    def batch(self, step: int, micro_index: int = 0) -> Batch:
        """The samples of this rank in micro-step `micro_index` of step `step` (from 0)."""
        data, (indices, epochs, positions) = self.data, self.places(step, micro_index)
        views = np.zeros(len(indices), dtype=np.int64)
        if data.views > 1:
            for epoch in np.unique(epochs).tolist():
                mask = epochs == epoch
                views[mask] = epoch_views(data.num_samples, self.seed, epoch, data.views)[
                    indices[mask]
                ]
        tokens_BL, labels_B = data.gather(indices, views)
        return Batch(tokens_BL, labels_B, positions)


class BatchSource(Protocol):
    """A loader: the samples of one rank, a pure function of step and micro-step."""

    accumulate: int

    def batch(self, step: int, micro_index: int = 0) -> Any:
        """The samples of this rank in micro-step `micro_index` of optimiser step `step`."""


class Ahead:
    """Reads the next batches of a loader in a thread while the step before them runs.

    The caller still decides which batches: a jump discards what was read ahead.
    """

    def __init__(self, loader: BatchSource):
        self.loader = loader
        self._pool = ThreadPoolExecutor(1, "data")
        self._coming: deque[tuple[tuple[int, int], Future[Any]]] = deque()

    def batch(self, step: int, micro_index: int = 0) -> Any:
        """The batch of the loader. Errors of the thread are raised here."""
        place = (step, micro_index)
        if not self._coming or self._coming[0][0] != place:  # the first batch, or a jump
            while self._coming:
                self._coming.pop()[1].cancel()
            self._ask(*place)
        _, batch = self._coming.popleft()
        last = self._coming[-1][0] if self._coming else place
        # Two batches: one that is being read, and one that is ready when the step ends.
        while len(self._coming) < 2:
            number = last[0] * self.loader.accumulate + last[1] + 1
            last = divmod(number, self.loader.accumulate)
            self._ask(*last)
        return batch.result()

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, step: int, micro_index: int) -> None:
        self._coming.append(
            ((step, micro_index), self._pool.submit(self.loader.batch, step, micro_index))
        )
