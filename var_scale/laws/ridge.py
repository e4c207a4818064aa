"""The joint region of floor and exponent that points allow, for a picture of their trade-off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from var_scale.laws.forms import LEVEL, Array
from var_scale.laws.law import LawFit
from var_scale.laws.power_floor import ALPHA_BOUNDS, ridge


class Ridge(NamedTuple):
    """The exponents that the points allow at each floor E; every array has the shape (floors,)."""

    floors: Array
    best: Array
    excess: Array
    """At the best exponent: objective above that of the best fit, in variances per run."""
    half: tuple[Array, Array]
    """Ends of the joint region of 50 %, NaN where no exponent is inside."""
    most: tuple[Array, Array]
    """Ends of the joint region of 95 %."""


def ridge_regions(fit: LawFit, floors: int = 600, alphas: int = 3000) -> Ridge:
    """Joint regions of E and alpha of a converged `power_floor`.

    A pair is inside when its objective is no further above the minimum than 2 F sd^2, with F the
    quantile of the level with 2 degrees of freedom and those of sd.
    """
    from scipy.special import fdtri

    x, y, root = np.asarray(fit.x), np.asarray(fit.y), np.sqrt(fit.given_weights())
    low, high = (min(max(end, ALPHA_BOUNDS[0]), ALPHA_BOUNDS[1]) for end in fit.intervals["alpha"])
    # Joint regions are wider than the intervals of one parameter, so the grid reaches beyond them.
    exponents = np.geomspace(max(low / 2, ALPHA_BOUNDS[0]), min(high * 2, ALPHA_BOUNDS[1]), alphas)
    e_low, e_high = fit.intervals["E"]
    e_high = min(e_high, float(y.min()))
    margin = 0.4 * (e_high - e_low) + 1e-3 * e_high
    top = min(e_high + margin, 0.9999 * float(y.min()))
    es = np.linspace(max(0.0, e_low - margin), top, floors)
    excess = np.maximum(ridge(x, y, es, exponents, root) - fit.objective, 0) / fit.noise.point.sd**2

    def ends(level: float) -> tuple[Array, Array]:
        inside = excess <= 2 * float(fdtri(2, fit.noise.point.freedom, level))
        some = inside.any(1)
        first, last = exponents[inside.argmax(1)], exponents[alphas - 1 - inside[:, ::-1].argmax(1)]
        return np.where(some, first, np.nan), np.where(some, last, np.nan)

    return Ridge(es, exponents[excess.argmin(1)], excess.min(1), ends(0.5), ends(LEVEL))
