"""Tokens from a grammar: a data set without images whose smallest possible loss is known exactly.

A token names a symbol and the rule that rewrites it. The rule determines the symbol of each of its
children, the cells of the next scale; the rule of each child is drawn independently, the r-th most
frequent with a probability proportional to r^-zipf. Given the coarser scales, the tokens of a scale
are therefore independent, as VAR assumes, and a model that knows the tables is left with the
entropy of the rules. The symbol of the root is one of those of the class. (This is a random
hierarchy model, Cagnetta et al., arXiv 2505.07067, on the scales of VAR.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from var_scale.data.generated import BLOCK, TokenSet
from var_scale.errors import UserError
from var_scale.scales import PatchNum, cells, grid, length

TABLES = 2**32  # key of the rule tables; the keys of blocks are smaller


@dataclass(frozen=True)
class GrammarSettings:
    """`symbols` x `rules` tokens over the scales `patch_nums`; the symbols are divided among
    `num_classes` classes.

    Raises:
        UserError: the symbols do not divide, or there are too many tokens.
    """

    patch_nums: tuple[PatchNum, ...]
    symbols: int = 64
    rules: int = 4
    zipf: float = 1.0
    num_classes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.symbols % self.num_classes:
            raise UserError(
                f"grammar: {self.symbols} symbols do not divide into {self.num_classes} classes; "
                "change one of them",
                code="data.grammar-settings",
            )
        if self.vocab_size > 65536:
            raise UserError(
                f"grammar: {self.symbols} symbols x {self.rules} rules exceed 65536 tokens; use "
                "fewer",
                code="data.grammar-settings",
            )

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; token = symbol * rules + rule."""
        return self.symbols * self.rules

    @property
    def share_R(self) -> np.ndarray:
        """Probability of each rule."""
        weight = np.arange(1, self.rules + 1, dtype=np.float64) ** -self.zipf
        return np.asarray(weight / weight.sum())


def bayes(settings: GrammarSettings) -> dict[str, float | list[float]]:
    """The smallest possible expected loss (nats per token) and error rate given the class: per
    scale, of the last scale, and over all tokens."""
    share = settings.share_R
    entropy, roots = float(-(share * np.log(share)).sum()), settings.symbols // settings.num_classes
    loss_S = [entropy + math.log(roots) * (scale == 0) for scale in range(len(settings.patch_nums))]
    error_S = [
        1 - float(share.max()) / (roots if scale == 0 else 1)
        for scale in range(len(settings.patch_nums))
    ]
    weight = np.array(cells(settings.patch_nums)) / length(settings.patch_nums)
    return {
        "loss_per_scale": loss_S,
        "err_per_scale": error_S,
        "loss_last": loss_S[-1],
        "err_last": error_S[-1],
        "loss_avg": float(weight @ loss_S),
        "err_avg": float(weight @ error_S),
    }


def children(settings: GrammarSettings) -> list[np.ndarray]:
    """The rule tables, one for each pair of scales: the symbol of the child in each of four places,
    (symbols * rules, 4)."""
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, TABLES]))
    return [
        rng.integers(settings.symbols, size=(settings.vocab_size, 4))
        for _ in settings.patch_nums[1:]
    ]


def grammar_set(settings: GrammarSettings) -> TokenSet:
    """The samples of a grammar."""
    return TokenSet("grammar", settings, bayes(settings), partial(_block, settings))


def _block(settings: GrammarSettings, split: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (BLOCK, L) and labels (BLOCK,) of block `block`, scale after scale from the root."""
    rng = np.random.Generator(
        np.random.Philox(key=[settings.seed, split], counter=[0, 0, block, 0])
    )
    edges = np.cumsum(settings.share_R)[:-1]
    labels = rng.integers(settings.num_classes, size=BLOCK)
    symbol = (
        rng.integers(settings.symbols // settings.num_classes, size=BLOCK) * settings.num_classes
        + labels
    )
    symbol_Bhw = symbol.reshape(BLOCK, 1, 1)
    scales: list[np.ndarray] = []
    tables = children(settings)
    for scale, (height, width) in enumerate(map(grid, settings.patch_nums)):
        if scale:
            # The row and the column of the parent that covers each cell.
            above = [
                np.arange(now) * before // now
                for before, now in zip(scales[-1].shape[1:], (height, width), strict=True)
            ]
            parent_Bhw = scales[-1][:, above[0][:, None], above[1][None]]
            symbol_Bhw = tables[scale - 1][
                parent_Bhw, 2 * (np.arange(height) % 2)[:, None] + (np.arange(width) % 2)[None]
            ]
        rule_Bhw = np.searchsorted(edges, rng.random((BLOCK, height, width)), side="right")
        scales.append(symbol_Bhw * settings.rules + rule_Bhw)
    return np.concatenate([tokens.reshape(BLOCK, -1) for tokens in scales], axis=1), labels


def picture(
    settings: GrammarSettings, tokens_L: Sequence[int] | np.ndarray, size: int = 64
) -> np.ndarray:
    """A picture of a sample: its scales side by side, each `size` pixels wide and high, one colour
    per symbol; uint8 (size, S * size, 3)."""
    rng = np.random.Generator(np.random.Philox(key=[settings.seed, TABLES + 1]))
    colours = rng.integers(40, 256, (settings.symbols, 3)).astype(np.uint8)
    sheets, start = [], 0
    for height, width in map(grid, settings.patch_nums):
        symbols = (
            np.asarray(tokens_L)[start : start + height * width].reshape(height, width)
            // settings.rules
        )
        down, across = (np.arange(size) * side // size for side in (height, width))
        sheets.append(colours[symbols[down[:, None], across[None]]])
        start += height * width
    return np.concatenate(sheets, axis=1)
