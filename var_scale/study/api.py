"""A law for any table: which rows enter, the fit, its result as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_scale.errors import UserError
from var_scale.study.laws import FORMS, SURFACES, VARIABLES, Array, Form, LawFit, t_factor
from var_scale.study.next_runs import information_rows
from var_scale.study.power import NOISE_FLOOR, fit_law

OUTLIER_P = 1e-3
"""a point is left out when, beside a law of the others, it would be this unlikely among as many points"""
SUSPECT = 6.0
"""robust standard deviations from a robust line beyond which a point is looked at"""
LEAST = 5e-3
"""relative deviation below which no point is looked at"""
FAR = 15.0
"""the same of a law of size and data, whose fit an outlier moves little"""
DRAWS = 200
Left = list[tuple[str, str, str]]


def fit(
    x: Sequence[float] | Array, y: Sequence[float] | Array, form: Form = "power", *, d: Sequence[float] | Array | None = None,
    unique: Sequence[float] | Array | None = None, floor: float = 0.0, names: Sequence[str] = (), metric: str = "y", variable: str = "x",
    outliers: bool = True, seed: int = 0, noise_floor: float = 0.0,
) -> LawFit:  # fmt: skip
    """Fit a law to points (x, y): sizes, compute or data, and losses or error rates.

    `form`: power, y = floor + a x^-alpha with the floor given; power_floor, the same with E >= 0 fitted; broken_power, two exponents
    about a break, the floor given; chinchilla, y = E + A x^-alpha + B d^-beta with `d` for the tokens; repeated, the same of tokens of
    which only `unique` are different. Equations: var_scale.study.laws. `names` of the points are for what was left out. Rows whose y is
    not a positive finite number (runs that diverged) are left out, and unless `outliers` is false also those that a law of the others
    makes impossible (p < 0.001 among all points, Student's t); `excluded` of the result says which and why. `seed` is the bootstrap's.
    `noise_floor`: smallest relative noise of a run that intervals assume.

    Returns a LawFit; look at `converged` (and `reason`) before using its `params`, `intervals` (95 %) and `predict`. UserError: x and y of
    different lengths, a form that is not known, an x that is not a positive number.
    """
    if form not in FORMS:
        raise UserError(f"law form {form!r} is not known; use one of {', '.join(FORMS)}")
    if (form in SURFACES) != (d is not None) or (form == "repeated") != (unique is not None):
        raise UserError(f"the form {form} is of {', '.join(VARIABLES[form])}: parameters as x, tokens as d, different tokens as unique")
    try:
        columns = [np.asarray(values, dtype=float) for values in (x, d, unique) if values is not None]
        ys = np.asarray(y, dtype=float)
    except ValueError:
        raise UserError(f"{metric}: sizes and values must be numbers") from None
    if any(column.ndim != 1 for column in (*columns, ys)):
        raise UserError(f"{metric}: give sizes and values as lists of numbers, one a row")
    if floor < 0:
        raise UserError(f"floor: {floor:g} is negative; an irreducible part is 0 or more")
    if any(len(column) != len(ys) for column in columns):
        raise UserError(f"{metric}: {', '.join(str(len(column)) for column in columns)} sizes and {len(ys)} values; give as many of each")
    if not all(np.isfinite(column).all() and (column > 0).all() for column in columns):
        raise UserError(f"{variable}: sizes must be positive finite numbers")
    xs = columns[0]
    labels = list(names) or [str(row) for row in range(len(xs))]
    left: Left = []
    kept: NDArray[np.bool_] = np.isfinite(ys) & (ys > 0)
    for row in np.flatnonzero(~kept).tolist():
        left.append((labels[row], "non_finite", f"{metric} is {ys[row]:g}, no positive finite number"))
    if outliers:
        found = _surface_outliers(form, columns, ys, kept) if form in SURFACES else _outliers(form, xs, ys, kept, floor)
        for row, text in found:
            kept[row] = False
            left.append((labels[row], "outlier", text))
    rows = [labels[row] for row in np.flatnonzero(kept).tolist()]
    if form in SURFACES:
        from var_scale.study.surface import fit_surface

        return fit_surface(xs[kept], columns[1][kept], ys[kept], columns[2][kept] if unique is not None else None, rows=rows, excluded=left,
                           draws=DRAWS, seed=seed, metric=metric)  # fmt: skip
    return fit_law(form, xs[kept].tolist(), ys[kept].tolist(), metric=metric, variable=variable, floor=floor, rows=rows, excluded=left,
                   noise_floor=noise_floor, seed=seed)  # fmt: skip


def _outliers(form: Form, x: Array, y: Array, kept: NDArray[np.bool_], floor: float) -> list[tuple[int, str]]:
    """Rows that a law of the others makes impossible. Suspects lie far from a robust line; a suspect is out only if the form's own
    prediction from the rest excludes it, so that a bend of the law makes no outlier."""
    index = np.flatnonzero(kept & (y > floor))
    if form in (*SURFACES, "broken_power") or len(index) < 6:  # robust, or bent by one point; too few points
        return []
    if form == "power":
        misses = _from_line(np.log(x[index]), np.log(y[index] - floor))
    else:  # a line in x^-alpha: the exponent at which most points lie on one
        u = np.log(x[index]) - np.log(x[index]).mean()
        lines = [_from_line(np.exp(-alpha * u), y[index]) / y[index] for alpha in np.geomspace(0.01, 3, 60)]
        misses = min(lines, key=lambda line: float(np.median(np.abs(line))))
    scale = max(1.4826 * float(np.median(np.abs(misses))), LEAST / SUSPECT)
    suspects = [int(row) for row, miss in zip(index, misses, strict=True) if abs(miss) > SUSPECT * scale]
    if not suspects or len(suspects) > len(index) // 4:
        return []
    sound = np.array([row for row in index if row not in suspects])
    law = fit_law(form, x[sound].tolist(), y[sound].tolist(), floor=floor, noise_floor=NOISE_FLOOR)
    if not law.converged:
        return []
    found = []
    for row in suspects:
        level = 1 - OUTLIER_P / len(index)
        if form == "power":
            low, high = (float(end[0]) for end in law.interval(x[row], level))
        else:  # draws do not reach so far out: Student's t about the fitted law, with what the others leave open there
            jacobian, here = information_rows(law, x[sound]), information_rows(law, x[[row]])[0]
            leverage = float(here @ np.linalg.pinv(jacobian.T @ jacobian) @ here)
            half = t_factor(level, law.freedom) * law.sd * math.sqrt(1 + leverage)
            middle = float(law.predict(x[row]))
            low, high = middle * math.exp(-half), middle * math.exp(half)
        if not low <= y[row] <= high:
            ratio = y[row] / float(law.predict(x[row]))
            found.append((row, f"{_times(ratio)} the law of the others, which allows {low:.4g} to {high:.4g}"))
    return found


def _surface_outliers(form: Form, columns: Sequence[Array], y: Array, kept: NDArray[np.bool_]) -> list[tuple[int, str]]:
    """Rows far from the robust fit of all: beyond FAR robust standard deviations and twice what Student's t allows among so many."""
    from var_scale.study.surface import fit_surface

    index = np.flatnonzero(kept)
    if len(index) < 12:
        return []
    unique = columns[2][index] if form == "repeated" else None
    law = fit_surface(columns[0][index], columns[1][index], y[index], unique)
    if not law.converged:
        return []
    misses = np.asarray(law.residuals)
    scale = max(1.4826 * float(np.median(np.abs(misses))) * math.sqrt(len(index) / law.freedom), LEAST / FAR)
    far = scale * max(FAR, 2 * t_factor(1 - OUTLIER_P / len(index), law.freedom))
    found = [(int(row), f"{_times(math.exp(miss))} the law of all, {abs(miss) / scale:.0f} times as far as others are")
             for row, miss in zip(index, misses, strict=True) if abs(miss) > far]  # fmt: skip
    return found if len(found) <= len(index) // 4 else []


def _times(ratio: float) -> str:
    """1.3 as +30 % of, 300 as 300 times."""
    return f"{100 * (ratio - 1):+.1f} % from" if 0.2 < ratio < 3 else f"{ratio:.3g} times"


def _from_line(u: Array, v: Array) -> Array:
    """Distances from a line that a quarter of the points cannot move: median of all slopes, then of all heights (Theil, Sen)."""
    i, j = np.triu_indices(len(u), 1)
    apart = u[i] != u[j]
    slope = np.median((v[j] - v[i])[apart] / (u[j] - u[i])[apart]) if apart.any() else 0.0
    rest = v - slope * u
    return np.asarray(rest - np.median(rest))


def to_json(law: LawFit) -> dict[str, Any]:
    """The result as plain values: form, params, intervals, objective, status, n_rows, excluded, and what else a LawFit holds."""
    value = law.to_json()
    excluded = [{"row": row, "code": code, "reason": text} for row, code, text in law.excluded]
    return value | {"n_rows": len(law.x), "excluded": excluded, "equation": law.equation}
