"""Tokens from a grammar: a data set without images whose smallest possible loss is known exactly.

A token names a symbol and the rule it is rewritten by. The rule says which symbol each of its children, the cells of the next scale below
it, has; the child's own rule is drawn anew, the r-th most frequent with probability proportional to r^-zipf. So the tokens of a scale are
independent given the coarser scales, as VAR assumes, and nothing but the entropy of the rules is left to a model that knows the tables.
The root's symbol is one of those that belong to the class. (A random hierarchy model, Cagnetta et al., arXiv:2505.07067, on VAR's scales.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from var_scale.data.manifest import Manifest
from var_scale.data.shards import ShardSet, token_sample
from var_scale.errors import UserError
from var_scale.progress import progress
from var_scale.scales import PatchNum, cells, grid, length

SPLITS = {"train": 0, "val": 1, "test": 2}
BLOCK = 4096  # samples that are drawn together
TABLES = 2**32  # key of the rule tables, beside the blocks'


@dataclass(frozen=True)
class GrammarSettings:
    """`symbols` x `rules` tokens over the scales `patch_nums`; the symbols are dealt out to `num_classes` classes."""

    patch_nums: tuple[PatchNum, ...]
    symbols: int = 64
    rules: int = 4
    zipf: float = 1.0
    num_classes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.symbols % self.num_classes:
            raise UserError(f"grammar: {self.symbols} symbols do not divide into {self.num_classes} classes; change one")
        if self.vocab_size > 65536:
            raise UserError(f"grammar: {self.symbols} symbols x {self.rules} rules are over 65536 tokens; use fewer")

    @property
    def vocab_size(self) -> int:
        """Different tokens; token = symbol * rules + rule."""
        return self.symbols * self.rules

    @property
    def share_R(self) -> np.ndarray:
        """Probability of each rule."""
        weight = np.arange(1, self.rules + 1, dtype=np.float64) ** -self.zipf
        return np.asarray(weight / weight.sum())


def bayes(settings: GrammarSettings) -> dict[str, float | list[float]]:
    """The smallest expected loss (nats a token) and error rate of any model that is told the class: per scale, last, over all tokens."""
    share = settings.share_R
    entropy, roots = float(-(share * np.log(share)).sum()), settings.symbols // settings.num_classes
    loss_S = [entropy + math.log(roots) * (scale == 0) for scale in range(len(settings.patch_nums))]
    error_S = [1 - float(share.max()) / (roots if scale == 0 else 1) for scale in range(len(settings.patch_nums))]
    weight = np.array(cells(settings.patch_nums)) / length(settings.patch_nums)
    return {"loss_per_scale": loss_S, "err_per_scale": error_S, "loss_last": loss_S[-1], "err_last": error_S[-1],
            "loss_avg": float(weight @ loss_S), "err_avg": float(weight @ error_S)}  # fmt: skip


def children(settings: GrammarSettings) -> list[np.ndarray]:
    """For each pair of scales the rewriting: symbol of the child in each of four places, (symbols * rules, 4), different for each scale."""
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, TABLES]))
    return [rng.integers(settings.symbols, size=(settings.vocab_size, 4)) for _ in settings.patch_nums[1:]]


def grammar_tokens(settings: GrammarSettings, split: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples [start, start + count) of a split ("train", "val", "test"): tokens int64 (count, L) and labels int64 (count,)."""
    if split not in SPLITS:
        raise UserError(f"grammar: split {split!r} is not one of {', '.join(SPLITS)}")
    tokens, labels = [], []
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        tokens_BL, labels_B = _block(settings, SPLITS[split], block)
        here = slice(max(start - block * BLOCK, 0), start + count - block * BLOCK)
        tokens.append(tokens_BL[here])
        labels.append(labels_B[here])
    return np.concatenate(tokens), np.concatenate(labels)


def _block(settings: GrammarSettings, split: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, split], counter=[0, 0, block, 0]))
    edges = np.cumsum(settings.share_R)[:-1]
    labels = rng.integers(settings.num_classes, size=BLOCK)
    symbol = rng.integers(settings.symbols // settings.num_classes, size=BLOCK) * settings.num_classes + labels
    symbol_Bhw = symbol.reshape(BLOCK, 1, 1)
    scales: list[np.ndarray] = []
    tables = children(settings)
    for scale, (height, width) in enumerate(map(grid, settings.patch_nums)):
        if scale:
            above = [np.arange(now) * before // now for before, now in zip(scales[-1].shape[1:], (height, width), strict=True)]
            parent_Bhw = scales[-1][:, above[0][:, None], above[1][None]]
            symbol_Bhw = tables[scale - 1][parent_Bhw, 2 * (np.arange(height) % 2)[:, None] + (np.arange(width) % 2)[None]]
        rule_Bhw = np.searchsorted(edges, rng.random((BLOCK, height, width)), side="right")
        scales.append(symbol_Bhw * settings.rules + rule_Bhw)
    return np.concatenate([tokens.reshape(BLOCK, -1) for tokens in scales], axis=1), labels


def write_grammar(folder: Path, split: str, count: int, settings: GrammarSettings, tokenizer_hash: str, samples_per_shard: int) -> Manifest:
    """Samples [0, count) of a split as token shards, with progress; continues a killed run. UserError: the folder holds other data."""
    tokens = {"dtype": "<u2", "views": 1, "length": length(settings.patch_nums), "patch_nums": list(settings.patch_nums),
              "vocab_size": settings.vocab_size, "tokenizer_hash": tokenizer_hash}  # fmt: skip
    source = {"name": "grammar", "count": count, **asdict(settings), "bayes": bayes(settings)}
    shards = ShardSet(folder, "tokens", split, settings.num_classes, samples_per_shard, source, tokens)
    if shards.complete:
        return shards.finish()
    with progress(f"grammar {split}", count, "samples") as bar:
        for number in range(-(-count // samples_per_shard)):
            first = number * samples_per_shard
            if shards.record(number) is None:
                rows, labels = grammar_tokens(settings, split, first, min(samples_per_shard, count - first))
                shards.write(number, [token_sample(row, label) for row, label in zip(rows[:, None], labels.tolist(), strict=True)])
            bar.update(min(count, first + samples_per_shard))
    return shards.finish()


def picture(settings: GrammarSettings, tokens_L: Sequence[int] | np.ndarray, size: int = 64) -> np.ndarray:
    """A sample to look at: each scale as wide and high as `size` pixels, a colour a symbol, side by side; uint8 (size, S * size, 3)."""
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, TABLES + 1]))
    colours = rng.integers(40, 256, (settings.symbols, 3)).astype(np.uint8)
    sheets, start = [], 0
    for height, width in map(grid, settings.patch_nums):
        symbols = np.asarray(tokens_L)[start : start + height * width].reshape(height, width) // settings.rules
        down, across = (np.arange(size) * side // size for side in (height, width))
        sheets.append(colours[symbols[down[:, None], across[None]]])
        start += height * width
    return np.concatenate(sheets, axis=1)
