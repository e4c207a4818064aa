"""Whether the points contradict the form of a law: its bend, and its misfit against the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from var_scale.laws.design import information_rows
from var_scale.laws.forms import LEVEL, t_factor
from var_scale.laws.law import LawFit
from var_scale.laws.nested import floor_test

SIGNIFICANT = 0.05
POWER = 0.8
"""Probability from which on a test that finds nothing counts as an answer."""
SHARE = 0.5
"""The floor that a straight line must be told from, as a share of the smallest value."""


@dataclass(frozen=True)
class Adequacy:
    """Tests of the form of one converged law; NaN where the points do not allow a test."""

    bend: float
    """Coefficient of (ln x)^2 beside a power law; positive if the points bend upwards, as a floor
    makes them."""
    p_bend: float
    """The p-value of this bend: upwards, that of `nested.floor_test`, which asks only for a floor;
    downwards, or where no law with a floor converged, the two-sided one of the coefficient."""
    power: float
    """Probability with which this test would notice a floor of half the smallest value."""
    p_noise: float
    """p-value of the lack-of-fit F test: the residuals of the sizes against the noise between
    repeats of one size."""

    @property
    def rejected(self) -> bool:
        """Whether a test contradicts the form."""
        return self.p_bend < SIGNIFICANT or self.p_noise < SIGNIFICANT

    @property
    def decided(self) -> bool:
        """Whether the test of the bend could have noticed a floor, or did notice a bend."""
        return self.p_bend < SIGNIFICANT or self.power >= POWER


def adequacy(law: LawFit, with_floor: LawFit | None = None) -> Adequacy:
    """Test the form of a converged `power` or `power_floor`.

    Args:
        with_floor: the form `power_floor` of the same points, for a `power`.
    """
    bend, p_bend = bend_test(law, with_floor)
    one_sided = with_floor is not None and with_floor.converged and law.params["E"] == 0
    power = _power(law, one_sided) if math.isfinite(p_bend) else math.nan
    return Adequacy(bend, p_bend, power, _lack_of_fit(law))


def bend_test(law: LawFit, with_floor: LawFit | None) -> tuple[float, float]:
    """Coefficient and p-value of a bend of a power law; see `Adequacy`. NaN, NaN for other forms.

    Of true power laws, 5 % seem to bend upwards with p < 0.05 and 2.5 % downwards.
    """
    bend, p = law.curvature()
    if bend > 0 and with_floor and with_floor.converged:
        p = floor_test(law, with_floor)
    return bend, p


def _lack_of_fit(law: LawFit) -> float:
    """p-value of F = residual variance of the means over that of repeats (Fisher 1922).

    The residual i of a law without misfit has the variance noise^2 (1 - leverage_i) / count_i, so
    the sum of squares is divided by the sum of these factors.
    """
    from scipy.special import fdtrc

    x, (counts, noise, freedom) = np.asarray(law.x), law.repeats
    if not law.repeats.known or law.freedom < 1:
        return math.nan
    rows = information_rows(law, x)
    leverage = np.einsum("ij,ji->i", rows, np.linalg.pinv(rows))
    misses = np.log(np.asarray(law.y) / law.predict(x))
    expected = float(((1 - leverage) / np.asarray(counts)).sum())
    ratio = float((misses**2).sum()) / expected / noise**2
    return float(fdtrc(law.freedom, freedom, ratio))


def _power(law: LawFit, one_sided: bool) -> float:
    """Power of the test for a bend against a floor of SHARE of the smallest value, with the noise
    of this fit (non-central t). The test for a floor is nearly that of the coefficient."""
    from scipy.special import nctdtr

    x, floor = np.asarray(law.x), law.params["E"]
    u, root, n = np.log(x), np.sqrt(law.weights(x)), len(law.x)
    fitted = np.asarray(law.predict(x))
    lifted = floor + SHARE * (fitted.min() - floor)
    # A law with that floor through the fitted values of the smallest and the largest size.
    ends = np.log(fitted[[u.argmin(), u.argmax()]] - lifted)
    alpha = (ends[0] - ends[1]) / (u.max() - u.min())
    curved = np.log(lifted + np.exp(ends[0] - alpha * (u - u.min())) - floor)
    basis = np.stack([np.ones(n), u - u.mean(), (u - u.mean()) ** 2], axis=1) * root[:, None]
    q, _ = np.linalg.qr(basis)
    noise = law.noise_of(law.residual_sd, n - 3).point
    shift = abs(float((q.T @ (curved * root))[2])) / noise.sd
    level = 2 * LEVEL - 1 if one_sided else LEVEL
    return float(1 - nctdtr(noise.freedom, shift, t_factor(level, noise.freedom)))
