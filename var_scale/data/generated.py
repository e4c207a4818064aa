"""Generated token sets: what they have in common, and how they become shards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from var_scale.data.manifest import Manifest
from var_scale.data.shards import ShardSet, token_sample
from var_scale.errors import UserError
from var_scale.machine import cores
from var_scale.progress import progress
from var_scale.scales import PatchNum, length

SPLITS = {"train": 0, "val": 1, "test": 2}
BLOCK = 4096
"""Samples drawn together. Part of the definition of the sets: changing it changes every sample."""
Rows = tuple[np.ndarray, np.ndarray]
"""Tokens int64 (N, L) and labels int64 (N,)."""


class Settings(Protocol):
    """The definition of a set: a frozen dataclass with at least these."""

    @property
    def patch_nums(self) -> tuple[PatchNum, ...]:
        """Token grid of each scale."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""


@dataclass(frozen=True)
class TokenSet:
    """A set of samples that depend only on its settings, the split and their number."""

    name: str
    settings: Settings
    bayes: dict[str, Any]
    """The smallest possible losses and error rates, for the manifest."""
    block: Callable[[int, int], Rows]
    """The BLOCK samples of the block `block` of the split `split`, from (split, block)."""

    def samples(self, split: str, start: int, count: int) -> Rows:
        """Samples [start, start + count) of a split ("train", "val", "test"): tokens int64
        (count, L) and labels int64 (count,).

        Raises:
            UserError: another split.
        """
        if split not in SPLITS:
            raise UserError(
                f"{self.name}: split {split!r} is not one of {', '.join(SPLITS)}",
                code="data.split-name",
            )
        tokens, labels = [], []
        for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
            tokens_BL, labels_B = self.block(SPLITS[split], block)
            here = slice(max(start - block * BLOCK, 0), start + count - block * BLOCK)
            tokens.append(tokens_BL[here])
            labels.append(labels_B[here])
        return np.concatenate(tokens), np.concatenate(labels)

    def write(
        self, folder: Path, split: str, count: int, tokenizer_hash: str, samples_per_shard: int
    ) -> Manifest:
        """Write samples [0, count) of a split as token shards, with progress; continues a killed
        run.

        Raises:
            UserError: the folder holds other data.
        """
        settings: Any = self.settings
        tokens = {
            "dtype": "<u2",
            "views": 1,
            "length": length(settings.patch_nums),
            "patch_nums": list(settings.patch_nums),
            "vocab_size": settings.vocab_size,
            "tokenizer_hash": tokenizer_hash,
        }
        source = {"name": self.name, "count": count, **asdict(settings), "bayes": self.bayes}
        shards = ShardSet(
            folder, "tokens", split, settings.num_classes, samples_per_shard, source, tokens
        )
        if shards.complete:
            return shards.finish()

        def draw(number: int) -> None:
            first = number * samples_per_shard
            rows, labels = self.samples(split, first, min(samples_per_shard, count - first))
            pairs = zip(rows[:, None], labels.tolist(), strict=True)
            shards.write(number, [token_sample(row, label) for row, label in pairs])

        numbers = range(-(-count // samples_per_shard))
        missing = [number for number in numbers if shards.record(number) is None]
        with (
            progress(f"{self.name} {split}", len(numbers), "shards") as bar,
            ThreadPoolExecutor(cores()) as pool,
        ):
            for done, _ in enumerate(pool.map(draw, missing), len(numbers) - len(missing) + 1):
                bar.update(done)
        return shards.finish()
