"""Resampling of runs, and percentile intervals.

Points of one run are not independent, so whole runs are drawn with replacement, never evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.forms import LEVEL, Array
from var_scale.laws.law import Interval

Indices = NDArray[np.int64]


def span(sample: Array, estimate: float | None = None) -> Interval:
    """Central 95 % of a sample of shape (draws,).

    Widened to hold `estimate`: with little noise all draws can lie on one side of it, by the
    resolution of the grid on which they were refitted.
    """
    low, high = (float(end) for end in np.percentile(sample, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
    return (low, high) if estimate is None else (min(low, estimate), max(high, estimate))


def drawn_noise(rng: np.random.Generator, sd: float, freedom: float, draws: int) -> Array:
    """Standard deviations (draws,) that are possible, given an estimate `sd` from few residuals.

    sd sqrt(freedom / chi2): draws with these give tails as wide as Student's t. With one degree of
    freedom they have no upper limit, so they end at 20 sd.
    """
    return np.asarray(sd * np.minimum(np.sqrt(freedom / rng.chisquare(freedom, draws)), 20))


def resamples(count: int, seed: int, draws: int) -> Iterator[Indices]:
    """Index sets of `count` runs drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(0, count, count)


def bootstrap_interval(
    statistic: Callable[[Indices], float | None], count: int, seed: int = 0, draws: int = 200
) -> Interval | None:
    """95 % percentile interval of `statistic(indices)` over resampled runs.

    None when more than half of the resamples give no value.
    """
    found = (statistic(index) for index in resamples(count, seed, draws))
    values = [value for value in found if value is not None]
    return None if len(values) < draws / 2 else span(np.array(values))
