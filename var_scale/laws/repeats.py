"""The noise about a law, from the scatter about the law and the scatter between repeats.

The residuals of a law of a few sizes have few degrees of freedom, so an interval from them alone is
wide: with two, Student's t is 4.3. Repeats of some sizes have degrees of freedom of their own. They
show the noise of a run, but not how far each size is from the law beyond that noise; that can only
be seen in the residuals. Both are therefore weighed together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.forms import Array

RATIOS = np.geomspace(0.1, 100.0, 200)
"""Errors that the runs of a size share, over the noise of a run. All are equally probable before
the residuals are seen."""
BEYOND = 30.0
"""Where the scatter about the law exceeds that between repeats by this factor, the latter tells
nothing about the former."""


class Repeats(NamedTuple):
    """Repeats of the points of a law, whose values are means over them."""

    counts: Sequence[int] = ()
    """Repeats of each point, (n,)."""
    noise: float = math.nan
    """Pooled standard deviation of ln y between the repeats of a point; NaN without repeats."""
    freedom: int = 0
    """Degrees of freedom of `noise`."""

    def of(self, kept: NDArray[np.bool_]) -> Repeats:
        """Those of some points; the noise stays that of all."""
        return self._replace(counts=tuple(np.asarray(self.counts)[kept])) if self.counts else self

    @property
    def known(self) -> bool:
        """Whether there are repeats that differ."""
        return self.noise > 0 and self.freedom > 0


class Spread(NamedTuple):
    """An estimated standard deviation as Student's t needs it."""

    sd: float
    """Relative to the value."""
    freedom: float
    """Degrees of freedom."""


class Noise(NamedTuple):
    """How far points and new runs are from a law of one variable."""

    point: Spread
    """Of the points of the law, which may be means of repeats."""
    run: Spread
    """Of a new run of a size that the law has not seen."""


NONE = Repeats()
NOT_KNOWN = Noise(Spread(math.nan, math.nan), Spread(math.nan, math.nan))


def noise_of(residual_sd: float, freedom: int, repeats: Repeats, least: float) -> Noise:
    """The noise of the points of a law and of a new run.

    Without repeats, or far beyond their noise, both are the scatter about the law. Otherwise let
    s^2 be the variance between repeats and (r s)^2 that of an error which the runs of a size share,
    because the law or the recipe does not suit the size. The mean of n runs then misses the law
    with the variance s^2 (1/n + r^2), where 1/n is averaged over the points, and a new run with
    s^2 (1 + r^2). The likelihood of both scatters weighs all s and RATIOS r. Each result has the
    mean and the variance of its weighed precision, which is 1 over its variance.

    Args:
        residual_sd: root of the sum of squared residuals of ln y over `freedom`.
        least: the smallest standard deviations to return.
    """
    if not repeats.known or residual_sd > BEYOND * repeats.noise:
        spread = Spread(max(residual_sd, least), freedom)
        return Noise(spread, spread)
    of_mean = float(np.mean(1 / np.asarray(repeats.counts))) + RATIOS**2
    squares = repeats.freedom * repeats.noise**2 + freedom * residual_sd**2 / of_mean
    total = freedom + repeats.freedom
    log_likelihood = -0.5 * (freedom * np.log(of_mean) + total * np.log(squares))
    weights = np.exp(log_likelihood - log_likelihood.max())
    weights /= weights.sum()

    def spread_of(variances: Array) -> Spread:
        # Given r, 1 / s^2 has a gamma distribution: chi^2 of `total` over `squares`.
        precision = total / (squares * variances)
        mean = float(weights @ precision)
        variance = float(weights @ (precision**2 * (1 + 2 / total))) - mean**2
        return Spread(max(math.sqrt(1 / mean), least), 2 * mean**2 / variance)

    return Noise(spread_of(of_mean), spread_of(1 + RATIOS**2))
