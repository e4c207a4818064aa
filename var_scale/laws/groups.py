"""Repeats of one size as one point of a fit, and the noise between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from var_scale.laws.forms import Array
from var_scale.laws.repeats import Repeats


class Groups(NamedTuple):
    """One point per size, smallest first."""

    names: list[str]
    sizes: list[float]
    values: list[float]
    """Geometric means; NaN where a value is not positive."""
    counts: list[int]
    """Rows of each size."""
    noise: float
    """Pooled standard deviation of ln value within the sizes, of a row of weight 1; NaN without
    repeats."""

    @property
    def repeats(self) -> Repeats:
        """What the fit of a law needs of them."""
        return Repeats(tuple(self.counts), self.noise, sum(self.counts) - len(self.counts))


def group(
    names: Sequence[str],
    sizes: Sequence[float] | Array,
    values: Sequence[float] | Array,
    weights: Sequence[float] | Array | None = None,
) -> Groups:
    """Join the rows of equal size.

    Repeats of a size share what the law misses there, so counting each as a point of its own would
    make intervals too narrow. For the same reason a size counts once however often it was repeated,
    unless the rows have weights.
    """
    rows: dict[float, list[int]] = {}
    for row, size in enumerate(sizes):
        rows.setdefault(float(size), []).append(row)
    logs = [math.log(value) if value > 0 else math.nan for value in values]
    order = sorted(rows)
    ws = [1.0] * len(logs) if weights is None else [float(weight) for weight in weights]
    totals = [sum(ws[row] for row in rows[size]) for size in order]
    means = [
        sum(ws[row] * logs[row] for row in rows[size]) / total
        for size, total in zip(order, totals, strict=True)
    ]
    square = sum(
        ws[row] * (logs[row] - mean) ** 2
        for size, mean in zip(order, means, strict=True)
        for row in rows[size]
    )
    counts = [len(rows[size]) for size in order]
    freedom = len(logs) - len(order)
    return Groups(
        ["+".join(names[row] for row in rows[size]) for size in order],
        order,
        [math.exp(mean) for mean in means],
        counts,
        math.sqrt(square / freedom) if freedom else math.nan,
    )


def summed(sizes: Sequence[float] | Array, weights: Sequence[float] | Array) -> list[float]:
    """The weight of each size, smallest size first: the sum over its rows."""
    totals: dict[float, float] = {}
    for size, weight in zip(sizes, weights, strict=True):
        totals[float(size)] = totals.get(float(size), 0.0) + float(weight)
    return [totals[size] for size in sorted(totals)]
