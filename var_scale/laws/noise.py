"""Whether the noise of the points of a law grows with size.

Intervals assume that it is the same share of y at all sizes. Where it grows, the interval of a new
run beyond the largest size is too narrow. Few points cannot show how fast it grows, so the
intervals are left as they are, and the law is marked: where the noise grows, and where the points
could not have shown it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from var_scale.laws.adequacy import POWER, SIGNIFICANT
from var_scale.laws.design import information_rows
from var_scale.laws.forms import SURFACES, Array
from var_scale.laws.law import NOISE_FLOOR, LawFit
from var_scale.laws.surface_draws import drawn_errors, surface_jacobian
from var_scale.laws.surface_objective import Objective, Problem

DRAWS = 2000
LEAST_POINTS = 6
GROWTH = 10.0
"""Noise of the largest size over that of the smallest that the test should be able to notice."""


class NoiseTrend(NamedTuple):
    """A test for noise that grows with size; NaN where the points do not allow it."""

    correlation: float
    """Of the squared residuals with ln x; above 0 if the noise is larger at large sizes."""
    p: float
    """One-sided p-value."""
    power: float
    """Probability with which the test would notice, at 5 %, noise that grows by GROWTH."""

    @property
    def grows(self) -> bool:
        """Whether the residuals show growing noise."""
        return self.p < SIGNIFICANT

    @property
    def undecided(self) -> bool:
        """Whether the residuals do not show growing noise, and could not have shown it."""
        return not self.grows and self.power < POWER


def noise_trend(law: LawFit) -> NoiseTrend:
    """Test the residuals of a law for noise that grows with size (Cook and Weisberg 1983).

    The correlation of the squared residuals with ln x, against its distribution for normal noise
    that does not change, by simulation with the residuals that this law leaves. In a surface with
    repeated sizes, the runs of a size may share an error, also in the simulation.

    NaN for broken_power, and for points on their law within the least noise that is assumed. With
    fewer than six points, and where the residuals are small beside the noise between seeds, the
    power is 0.
    """
    n = len(law.x)
    if law.form == "broken_power" or not law.converged:
        return NoiseTrend(math.nan, math.nan, math.nan)
    if law.residual_sd < max(0.5 * min(law.noise_floor, NOISE_FLOOR), 1e-10):
        return NoiseTrend(math.nan, math.nan, math.nan)
    least = max(law.noise_floor, law.repeats.noise if law.repeats.known else 0)
    if n < LEAST_POINTS or law.residual_sd < 0.5 * least:
        return NoiseTrend(math.nan, math.nan, 0.0)
    x, y = np.asarray(law.x), np.asarray(law.y)
    fitted = law.predict(*map(np.asarray, law.points))
    u = np.log(x) - np.log(x).mean()
    weights = law.given_weights() * (np.asarray(law.repeats.counts) if law.repeats.counts else 1)
    root, slopes, rng = np.sqrt(weights), _derivatives(law), np.random.default_rng(n)
    q, _ = np.linalg.qr(root[:, None] * slopes)
    drawn = rng.standard_normal((DRAWS, n))
    sizes, size = np.unique(x, return_inverse=True)
    if law.form in SURFACES and n >= 2 * len(sizes):
        _, ratios = drawn_errors(np.log(y / fitted), slopes, size, weights, rng, DRAWS)
        drawn += root * ratios[:, None] * rng.standard_normal((DRAWS, len(sizes)))[:, size]
    growing = drawn * np.exp(u * math.log(GROWTH) / np.ptp(u))
    missed = np.vstack([root * np.log(y / fitted), drawn, growing])
    squares = (missed - missed @ q @ q.T) ** 2
    squares -= squares.mean(1, keepdims=True)
    r = squares @ u / (np.linalg.norm(squares, axis=1) * np.linalg.norm(u))
    found, null, alternative = float(r[0]), r[1 : DRAWS + 1], r[DRAWS + 1 :]
    p = (1 + int((null >= found).sum())) / (DRAWS + 1)
    power = float((alternative > np.quantile(null, 1 - SIGNIFICANT)).mean())
    return NoiseTrend(found, p, power)


def _derivatives(law: LawFit) -> Array:
    """Derivatives of ln y at the points by the parameters, (n, parameters)."""
    if law.form not in SURFACES:
        return information_rows(law, np.asarray(law.x))
    n, d, y = (np.asarray(values) for values in (law.x, law.d, law.y))
    unique = np.asarray(law.unique) if law.unique else np.full_like(d, np.inf)
    weights = law.given_weights()
    return surface_jacobian(Problem.of(law.form, n, d, y, unique, weights, Objective()), law.params)
