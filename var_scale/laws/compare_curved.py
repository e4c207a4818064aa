"""Whether two groups of runs follow one law with a floor, or one surface.

These laws are no straight lines, so one law is fitted to both groups together, and its misses of
ln y are compared with those of a law per group, in units of the noise of each group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from var_scale.laws.forms import NAMES, PARAMETERS, Array, law_value
from var_scale.laws.law import LawFit

LOGS = ("a", "A", "B", "r_star")
"""Parameters that are searched as logs."""
FACTORS = {"a": ("alpha", 0), "A": ("alpha", 0), "B": ("beta", 1)}
"""Coefficients: their exponents, and the number of their variables."""


class Tests(NamedTuple):
    """The comparison of two groups."""

    p_same: float
    """p-value of one common law."""
    p_factor: float
    """p-value of laws that differ by a factor only."""
    shift: float
    """ln of that factor, second over first."""
    error: float
    """Its standard error."""
    freedom: float


class _Found(NamedTuple):
    """A least-squares fit."""

    square: float
    """The sum of squares."""
    jacobian: Array
    """Of the misses, (rows, parameters)."""
    theta: Array


def compare_curved(one: LawFit, two: LawFit) -> Tests:
    """Test two converged fits of one form with a fitted floor, or of one surface.

    Each group has its own noise (`repeats.noise_of`). The F tests have as many degrees of
    freedom in the denominator as Satterthwaite's method gives for the parameters together.
    """
    from scipy.special import fdtrc

    laws, form = (one, two), one.form
    pairs = zip(one.points, two.points, strict=True)
    centres = [float(np.log(np.concatenate(pair)).mean()) for pair in pairs]
    alone = [_least(form, [law], [1.0], centres, [law.params], factor=False) for law in laws]
    scatters = [
        law.noise_of(math.sqrt(found.square / law.freedom), law.freedom).point
        for found, law in zip(alone, laws, strict=True)
    ]
    noises, frees = ([noise[i] for noise in scatters] for i in (0, 1))
    if max(noises) < 1e-12:  # residuals of 1e-12 are rounding
        return Tests(*[math.nan] * 5)
    noises = [max(noise, 1e-6 * max(noises)) for noise in noises]
    separate = sum(found.square / noise**2 for found, noise in zip(alone, noises, strict=True))
    starts = [law.params for law in laws]
    same, factor = (
        _least(form, laws, noises, centres, starts, factor=free) for free in (False, True)
    )
    count = PARAMETERS[form]
    parts = np.split(same.jacobian, [len(one.x)])
    known = [part.T @ part for part in parts]
    # The share of each group in the variance of the difference of both sets of parameters: that of
    # the first is large where the second knows much.
    total = np.linalg.pinv(known[0] + known[1])
    shares = [float(np.trace(other @ total)) for other in reversed(known)]
    freedom = count**2 / sum(s**2 / free for s, free in zip(shares, frees, strict=True))
    p_same, p_factor = (
        float(fdtrc(n, freedom, max(found.square - separate, 0) / n))
        for found, n in ((same, count), (factor, count - 1))
    )
    covariance = np.linalg.pinv(factor.jacobian.T @ factor.jacobian)
    error = math.sqrt(float(covariance[-1, -1]))
    return Tests(p_same, p_factor, float(factor.theta[-1]), error, freedom)


def _least(
    form: str,
    laws: Sequence[LawFit],
    noises: Sequence[float],
    centres: Sequence[float],
    starts: Sequence[dict[str, float]],
    factor: bool,
) -> _Found:
    """The least squares of ln y over the noise, of one law for all groups from several starts.

    Args:
        centres: means of the logs of the variables; a coefficient is searched as its value there,
            which hardly depends on its exponent.
        factor: whether the last group may differ by a factor, the last parameter.
    """
    from scipy.optimize import least_squares

    names = NAMES[form]
    columns = zip(*(law.points for law in laws), strict=True)
    places = [np.concatenate(values) for values in columns]
    logs = np.log(np.concatenate([law.y for law in laws]))
    scale = np.concatenate(
        [np.sqrt(law.given_weights()) / noise for law, noise in zip(laws, noises, strict=True)]
    )
    counts = [len(law.x) for law in laws]
    last = np.repeat([0.0] * (len(laws) - 1) + [1.0], counts)

    def exponent(params: dict[str, float], name: str) -> float:
        return params[name] if name in params else params["alpha"]  # tied has no beta

    def natural(theta: Array) -> dict[str, float]:
        params = dict(zip(names, map(float, theta), strict=False))
        for name in set(names) & set(LOGS):
            power, variable = FACTORS.get(name, ("", 0))
            shift = exponent(params, power) * centres[variable] if power else 0.0
            params[name] = math.exp(min(params[name] + shift, 700))
        return params

    def searched(params: dict[str, float]) -> list[float]:
        theta = []
        for name in names:
            value = math.log(params[name]) if name in LOGS else params[name]
            if name in FACTORS:
                power, variable = FACTORS[name]
                value -= exponent(params, power) * centres[variable]
            theta.append(value)
        return theta + [0.0] * factor

    def misses(theta: Array) -> Array:
        fitted = np.log(np.maximum(law_value(form, natural(theta), *places), 1e-300))
        return np.asarray((fitted + (theta[-1] * last if factor else 0) - logs) * scale)

    low = [0.0 if name == "E" else -math.inf for name in names] + [-math.inf] * factor
    found = [
        least_squares(
            misses, np.maximum(searched(start), low), bounds=(low, math.inf), x_scale="jac"
        )
        for start in starts
    ]
    best = min(found, key=lambda end: float(end.cost))
    return _Found(2 * float(best.cost), np.asarray(best.jac), np.asarray(best.x))
