"""Points that a law of the others makes impossible.

A point is left out only if a law with a floor of the other points excludes it, and if no falling
curve passes through it and through the others: it is higher than a smaller size, or lower than a
larger one. So a bend of the law, or a wrong form, makes no outliers. The rule is the same for all
laws of one variable, because their AICc are comparable only for the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.curve import fit_law
from var_scale.laws.design import information_rows
from var_scale.laws.forms import SURFACES, Array, Form, t_factor
from var_scale.laws.law import NOISE_FLOOR, LawFit
from var_scale.laws.surface import fit_surface

OUTLIER_P = 1e-3
"""A point is left out when it would be this unlikely among as many points, given the others."""
SUSPECT = 6.0
"""Robust standard deviations from a robust line beyond which a point is examined."""
LEAST = 5e-3
"""Relative deviation below which no point is examined."""
FAR = 15.0
"""Robust standard deviations from a surface, whose robust fit an outlier hardly moves."""
Found = list[tuple[int, str]]
"""Rows and the sentence that explains each."""


def find_outliers(form: Form, columns: Sequence[Array], y: Array, kept: NDArray[np.bool_]) -> Found:
    """Outliers among the rows `kept`.

    Args:
        columns: the variables of the form, each (n,).
        y: values, (n,).
        kept: rows that enter, (n,).

    Returns:
        Row and explanation of each outlier; nothing when more than a quarter of the points would be
        left out.
    """
    index = np.flatnonzero(kept)
    found = _of_surface(form, columns, y, index) if form in SURFACES else []
    if form not in SURFACES:
        found = _of_curve(columns[0], y, index)
    return found if len(found) <= len(index) // 4 else []


def _of_curve(x: Array, y: Array, index: NDArray[np.intp]) -> Found:
    """Rows far from a robust line that the law of the other rows excludes."""
    if len(index) < 6:
        return []
    # A line in x^-alpha, with the exponent at which most points lie on one. A power law is one too.
    u = np.log(x[index]) - np.log(x[index]).mean()
    lines = [
        _from_line(np.exp(-alpha * u), y[index]) / y[index] for alpha in np.geomspace(0.01, 3, 60)
    ]
    misses = min(lines, key=lambda line: float(np.median(np.abs(line))))
    # 1.4826 times the median absolute deviation is the standard deviation of normal errors.
    scale = max(1.4826 * float(np.median(np.abs(misses))), LEAST / SUSPECT)
    far = np.abs(misses) > SUSPECT * scale
    sound = index[~far]
    suspects = [
        int(row)
        for row, miss in zip(index[far], misses[far], strict=True)
        if _breaks_order((x,), y, row, sound, miss > 0)
    ]
    if not suspects or far.sum() > len(index) // 4:
        return []
    fits = (
        fit_law(form, x[sound], y[sound], noise_floor=NOISE_FLOOR)
        for form in ("power_floor", "power")
    )
    law = next((fit for fit in fits if fit.converged), None)
    if law is None:
        return []
    found = []
    for row in suspects:
        low, high = _allowed(law, x[sound], x[row], 1 - OUTLIER_P / len(index))
        if not low <= y[row] <= high:
            ratio = _times(y[row] / float(law.predict(x[row])))
            found.append(
                (row, f"{ratio} the law of the others, which allows {low:.4g} to {high:.4g}")
            )
    return found


def _breaks_order(
    columns: Sequence[Array], y: Array, row: int, sound: NDArray[np.intp], high: bool
) -> bool:
    """Whether a row is higher (otherwise lower) than a sound row that has no more (no less) of
    every variable, which is impossible on a law that falls."""
    sign = 1 if high else -1
    beaten = sign * (y[row] - y[sound]) > 0
    for column in columns:
        beaten &= sign * (column[row] - column[sound]) >= 0
    return bool(beaten.any())


def _allowed(law: LawFit, sound: Array, x: float, level: float) -> tuple[float, float]:
    """Prediction interval of the law of the others at x, at a level close to 1."""
    # Draws do not reach so far into the tails: Student's t about the law, with the leverage of x.
    jacobian, here = information_rows(law, sound), information_rows(law, np.array([x]))[0]
    leverage = float(here @ np.linalg.pinv(jacobian.T @ jacobian) @ here)
    half = t_factor(level, law.noise.run.freedom) * law.noise.run.sd * math.sqrt(1 + leverage)
    middle = float(law.predict(x))
    return middle * math.exp(-half), middle * math.exp(half)


def _of_surface(form: Form, columns: Sequence[Array], y: Array, index: NDArray[np.intp]) -> Found:
    """Rows beyond FAR robust standard deviations and twice what Student's t allows, which also
    break the order of a falling law."""
    if len(index) < 12:
        return []
    unique = columns[2][index] if form == "repeated" else None
    law = fit_surface(columns[0][index], columns[1][index], y[index], unique)
    if not law.converged:
        return []
    misses = np.asarray(law.residuals)
    # Fitted parameters shrink the residuals, hence the factor of points over degrees of freedom.
    scale = 1.4826 * float(np.median(np.abs(misses))) * math.sqrt(len(index) / law.freedom)
    scale = max(scale, LEAST / FAR)
    far = scale * max(FAR, 2 * t_factor(1 - OUTLIER_P / len(index), law.freedom))
    near = index[np.abs(misses) <= far]
    found = []
    for row, miss in zip(index, misses, strict=True):
        if abs(miss) > far and _breaks_order(columns[:2], y, row, near, miss > 0):
            text = f"{_times(math.exp(miss))} the law of all points, {abs(miss) / scale:.0f} times"
            found.append((int(row), f"{text} as far from it as the others"))
    return found


def _times(ratio: float) -> str:
    """1.3 as `+30.0 % from`, 300 as `300 times`."""
    return f"{100 * (ratio - 1):+.1f} % from" if 0.2 < ratio < 3 else f"{ratio:.3g} times"


def _from_line(u: Array, v: Array) -> Array:
    """Distances from a line that a quarter of the points cannot move (Theil 1950, Sen 1968).

    Its slope is the median over all pairs of points, its height the median of what is left.
    """
    i, j = np.triu_indices(len(u), 1)
    apart = u[i] != u[j]
    slope = np.median((v[j] - v[i])[apart] / (u[j] - u[i])[apart]) if apart.any() else 0.0
    rest = v - slope * u
    return np.asarray(rest - np.median(rest))
