"""Seeded bootstrap: parametric for the law with a floor, by run (never by checkpoint) for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from var_scale.study.laws import LEVEL, Array

Indices = NDArray[np.int64]

DRAWS = 1000
COARSE, FINE = 80, 41


def floor_draws(x: Array, fitted: Array, sd: float, seed: int = 0, draws: int = DRAWS) -> Array:
    """Refits of E + a x^-alpha to simulated points: rows of (E, a, alpha, sd), shape (draws, 4).

    Each draw first takes its own sd, sd sqrt(df / chi2_df) with df = n - 3, so that few points give wide tails as Student's t does,
    then y = fitted exp(sd z). All draws are refitted together by the profile over a coarse and a fine grid of alpha.
    """
    from var_scale.study.power import ALPHA_BOUNDS, profile

    rng = np.random.default_rng(seed)
    n = len(x)
    df = max(n - 3, 1)
    sds = sd * np.sqrt(df / rng.chisquare(df, draws))
    sds = np.minimum(sds, 20 * sd)  # one degree of freedom has draws without limit
    y = fitted * np.exp(sds[:, None] * rng.standard_normal((draws, n)))
    out = np.empty((draws, 4))
    for part in np.array_split(np.arange(draws), max(1, draws * n // 4000)):
        coarse = np.linspace(np.log(ALPHA_BOUNDS[0]), np.log(ALPHA_BOUNDS[1]), COARSE)
        values = profile(np.exp(coarse)[None, :], x, y[part, None, :])[2]
        best = coarse[values.argmin(1)]
        step = coarse[1] - coarse[0]
        fine = best[:, None] + np.linspace(-step, step, FINE)
        floors, bs, objective = profile(np.exp(fine), x, y[part, None, :])
        pick, row = objective.argmin(1), np.arange(len(part))
        alpha = np.exp(fine[row, pick])
        out[part, 0], out[part, 2], out[part, 3] = floors[row, pick], alpha, sds[part]
        out[part, 1] = bs[row, pick] * np.exp(alpha * np.log(x).mean())
    return out


def resamples(count: int, seed: int = 0, draws: int = DRAWS) -> Iterator[Indices]:
    """Index sets of `count` runs drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(0, count, count)


def bootstrap_interval(
    statistic: Callable[[Indices], float | None], count: int, seed: int = 0, draws: int = 200
) -> tuple[float, float] | None:
    """95 % percentile interval of `statistic(indices)` over resampled runs; None when most resamples give no value."""
    values = [value for index in resamples(count, seed, draws) if (value := statistic(index)) is not None]
    if len(values) < draws / 2:
        return None
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
