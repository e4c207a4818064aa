"""Whether two groups of runs follow one law: kernels on or off, ZeRO or FSDP, two data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.compare_curved import compare_curved
from var_scale.laws.forms import LEVEL, SURFACES, Array, t_factor
from var_scale.laws.law import LawFit

CURVED = ("power_floor", *SURFACES)
"""Forms with a fitted floor, which are no straight lines."""


@dataclass(frozen=True)
class Comparison:
    """Two laws of one form and metric: power laws of one floor, tested as straight lines in logs,
    laws with a fitted floor, or surfaces."""

    p_same: float
    """p-value of one common law: all parameters are equal."""
    p_exponent: float
    """p-value of power laws with a common exponent, levels free; of the other forms, of laws that
    differ by a factor only."""
    ratio: float
    """Second over first, if the exponents (of the other forms, all but a factor) are common: of
    y - E of power laws, at the middle of all sizes, and of y of the other forms."""
    low: float
    high: float
    """95 % interval of `ratio`."""
    freedom: float
    """Degrees of freedom of `p_same`, as Satterthwaite estimates them."""


class _Line(NamedTuple):
    """A straight line in logs."""

    level: float
    """At the middle of the sizes of both groups."""
    slope: float
    covariance: Array
    """Of (level, slope), for a noise of 1: (2, 2)."""
    variance: float
    """Of the noise."""
    freedom: float
    middle: float
    """Weighted mean of the sizes, at which level and slope are uncorrelated."""


def compare(one: LawFit, two: LawFit) -> Comparison:
    """Test two converged fits of one form by the method of Welch.

    Each group has its own noise (`repeats.noise_of`); a pooled noise would call equal laws
    different when the smaller group is the noisier one. Degrees of freedom are Satterthwaite's.

    Raises:
        UserError: code `laws.compare-forms` for another form or a fit that did not converge,
            `laws.compare-floors` for different metrics or floors, `laws.compare-noiseless` for
            points exactly on their laws.
    """
    from scipy.special import fdtrc

    wrong = [law for law in (one, two) if not law.converged or law.form not in ("power", *CURVED)]
    if wrong or one.form != two.form:
        why = wrong[0].reason or wrong[0].form if wrong else f"{one.form} and {two.form}"
        raise UserError(
            "compare: two converged fits of one form are needed, power, power_floor or a surface "
            f"({why})",
            code="laws.compare-forms",
        )
    if one.form in CURVED and one.metric == two.metric:
        return _curved(one, two)
    if one.form in CURVED or one.params["E"] != two.params["E"] or one.metric != two.metric:
        raise UserError(
            f"compare: the laws are of {one.metric} with E = {one.params['E']:g} and of "
            f"{two.metric} with E = {two.params['E']:g}; use the same metric and floor",
            code="laws.compare-floors",
        )
    middle = float(np.log(np.concatenate([one.x, two.x])).mean())
    lines = [_line(law, middle) for law in (one, two)]
    if sum(line.variance for line in lines) < 1e-24:  # residuals of 1e-12 are rounding
        raise _noiseless()
    apart = np.array([lines[1].level - lines[0].level, lines[1].slope - lines[0].slope])
    parts = [line.variance * line.covariance for line in lines]
    inverse = np.linalg.inv(parts[0] + parts[1])
    # Satterthwaite's degrees of freedom for both differences together.
    freedom = 4 / sum(
        float(np.trace(part @ inverse)) ** 2 / line.freedom
        for part, line in zip(parts, lines, strict=True)
    )
    p_same = float(fdtrc(2, freedom, float(apart @ inverse @ apart) / 2))
    slopes = [float(part[1, 1]) for part in parts]
    free = _satterthwaite(slopes, lines)
    p_exponent = float(fdtrc(1, free, apart[1] ** 2 / sum(slopes)))
    shift, spread, free = _shift(lines, slopes)
    half = t_factor(LEVEL, free) * spread
    low, high = math.exp(shift - half), math.exp(shift + half)
    return Comparison(p_same, p_exponent, math.exp(shift), low, high, freedom)


def _noiseless() -> UserError:
    return UserError(
        "compare: all points lie exactly on their laws, so there is no noise by which to judge a "
        "difference; are both the same table?",
        code="laws.compare-noiseless",
    )


def _curved(one: LawFit, two: LawFit) -> Comparison:
    """The comparison of laws that are no straight lines."""
    tests = compare_curved(one, two)
    if math.isnan(tests.p_same):
        raise _noiseless()
    half = t_factor(LEVEL, tests.freedom) * tests.error
    ratio, low, high = (math.exp(tests.shift + side) for side in (0.0, -half, half))
    return Comparison(tests.p_same, tests.p_factor, ratio, low, high, tests.freedom)


def _line(law: LawFit, middle: float) -> _Line:
    """The line through ln (y - E) against ln x - `middle`, weighted as the noise is."""
    x = np.asarray(law.x)
    u, v = np.log(x) - middle, np.log(np.asarray(law.y) - law.params["E"])
    weights = law.precisions()
    root = np.sqrt(weights)
    q, r = np.linalg.qr(np.stack([root, root * u], axis=1))
    found = np.linalg.solve(r, q.T @ (root * v))
    rest = root * (v - found[0] - found[1] * u)
    inverse = np.linalg.inv(r)
    sd = math.sqrt(float(rest @ rest) / law.freedom)
    noise = law.noise_of(sd, law.freedom).point
    centre = float(weights @ u / weights.sum())
    level, slope = map(float, found)
    return _Line(level, slope, inverse @ inverse.T, noise.sd**2, noise.freedom, centre)


def _shift(lines: list[_Line], slopes: list[float]) -> tuple[float, float, float]:
    """Difference of the levels with a common slope, its standard error and degrees of freedom.

    Args:
        slopes: variances of the slopes.
    """
    # The slopes are averaged by their precision. Where one line has no noise it alone counts.
    shares = [1 - slope / sum(slopes) for slope in slopes]
    common = sum(share * line.slope for share, line in zip(shares, lines, strict=True))
    heights = [line.level + line.slope * line.middle for line in lines]
    apart = lines[1].middle - lines[0].middle
    variances = [
        # Of the height at a line's own middle, where its slope does not matter, and of its part of
        # the common slope.
        slope * (line.covariance[0, 0] / line.covariance[1, 1] - line.middle**2)
        + (apart * share) ** 2 * slope
        for slope, share, line in zip(slopes, shares, lines, strict=True)
    ]
    shift = heights[1] - heights[0] - common * apart
    return shift, math.sqrt(sum(variances)), _satterthwaite(variances, lines)


def _satterthwaite(variances: list[float], lines: list[_Line]) -> float:
    """Degrees of freedom of the sum of two estimated variances."""
    parts = (v**2 / line.freedom for v, line in zip(variances, lines, strict=True))
    return sum(variances) ** 2 / sum(parts)
