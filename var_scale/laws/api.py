"""A law for any table: which rows enter, the fit, and its result as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_scale.errors import UserError
from var_scale.laws.curve import fit_law
from var_scale.laws.forms import FORMS, SURFACES, VARIABLES, Array, Form
from var_scale.laws.groups import group, summed
from var_scale.laws.law import NOISE_FLOOR, LawFit, plain
from var_scale.laws.noise import noise_trend
from var_scale.laws.outliers import find_outliers
from var_scale.laws.repeats import NONE
from var_scale.laws.surface import fit_surface
from var_scale.laws.surface_objective import DELTA, OBJECTIVES, Objective, ObjectiveName

DRAWS = 1000
"""Bootstrap draws of a surface."""


def fit(
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    form: Form = "power",
    *,
    d: Sequence[float] | Array | None = None,
    unique: Sequence[float] | Array | None = None,
    floor: float = 0.0,
    names: Sequence[str] = (),
    metric: str = "y",
    variable: str = "x",
    outliers: bool = True,
    seed: int = 0,
    noise_floor: float = NOISE_FLOOR,
    weights: Sequence[float] | Array | None = None,
    objective: ObjectiveName = "huber_log",
    delta: float = DELTA,
    rising: bool = False,
    intervals: bool = True,
) -> LawFit:
    """Fit a law to points (x, y): sizes, compute or tokens, and losses or error rates.

    Rows of equal x are repeats of one size: a law of one variable takes their geometric mean, and
    its intervals use the noise between them beside the scatter about the law
    (`laws.repeats.noise_of`). A surface takes every row.

    Rows whose y is not a positive finite number (runs that diverged) are left out, and unless
    `outliers` is false also those that a law of the others makes impossible (p < 0.001 among all
    points, Student's t) and through which no falling curve passes. `excluded` of the result names
    each with its code and a sentence.

    Args:
        x: positive numbers, (n,).
        y: values, (n,).
        form: power, y = floor + a x^-alpha; power_floor, the same with the floor fitted;
            broken_power, two exponents about a break; chinchilla, y = E + A x^-alpha + B d^-beta;
            tied, the same with beta = alpha; repeated, the same for tokens of which only `unique`
            are different. The equations are in `var_scale.laws.forms`.
        d: tokens, for the surfaces chinchilla, tied and repeated.
        unique: different tokens among d, for repeated.
        floor: the irreducible part E that power and broken_power assume.
        names: names of the rows.
        seed: seed of the bootstrap.
        noise_floor: smallest relative noise per run that intervals assume; the default is that of
            measured losses.
        weights: positive weights of the rows, such as 1 / variance, not for broken_power. The
            variance of a row's noise is taken to be inverse to its weight, and a new run to have
            their mean weight.
        objective: what the fit of a surface minimises: huber_log, Huber's loss of ln y; huber,
            Huber's loss of y; mse, the squares of y.
        delta: Huber's threshold, on ln y or in the unit of y.
        rising: whether the law rises, as the best size does with compute. For the form power
            without a floor; alpha is then negative, and the parameter `exponent` is -alpha.
        intervals: whether intervals are needed. Without them one run more than the form has
            parameters is enough for a surface; with them nine.

    Returns:
        A LawFit. Check `converged` (and `code`, `reason`) before you use its `params`, `intervals`
        (95 %) and `predict`.

    Raises:
        UserError: code `laws.form-unknown`, `laws.variables`, `laws.not-numbers`,
            `laws.floor-negative`, `laws.lengths-differ`, `laws.not-positive` or `laws.option`.
    """
    columns, ys = _checked(form, x, y, d, unique, floor, metric, variable)
    ws = _weights(form, weights, len(ys))
    minimise = _objective(form, objective, delta)
    if rising and (form != "power" or floor):
        raise UserError(
            f"rising: a law that rises has the form power and no floor, not {form} with the floor "
            f"{floor:g}; leave rising or the others out",
            code="laws.option",
        )
    labels = list(names) or [str(row) for row in range(len(ys))]
    kept: NDArray[np.bool_] = np.isfinite(ys) & (ys > 0)
    repeats = NONE
    left = [
        (labels[row], "non_finite", f"{metric} is {ys[row]:g}, not a positive finite number")
        for row in np.flatnonzero(~kept).tolist()
    ]
    if form not in SURFACES:
        sound = np.flatnonzero(kept).tolist()
        joined = group([labels[row] for row in sound], columns[0][kept], ys[kept], ws[kept])
        if weights is not None:
            ws = np.array(summed(columns[0][kept], ws[kept]))
        else:
            ws = np.ones(len(joined.sizes))
        labels, columns, ys = joined.names, [np.array(joined.sizes)], np.array(joined.values)
        kept = np.ones(len(ys), dtype=bool)
        if weights is None:
            repeats = joined.repeats
        elif math.isfinite(joined.noise):
            noise_floor = max(noise_floor, joined.noise)
    # Rows of little weight may be far away, so they contradict nothing.
    if outliers and weights is None:
        falling = [1 / columns[0]] if rising else columns
        for row, text in find_outliers(form, falling, ys, kept):
            kept[row] = False
            left.append((labels[row], "outlier", text))
    rows = [labels[row] for row in np.flatnonzero(kept).tolist()]
    points = [column[kept] for column in columns]
    if form in SURFACES:
        return fit_surface(
            points[0],
            points[1],
            ys[kept],
            points[2] if unique is not None else None,
            form=form,
            weights=ws[kept] if weights is not None else None,
            minimise=minimise,
            rows=rows,
            excluded=left,
            draws=DRAWS if intervals else 0,
            seed=seed,
            metric=metric,
        )
    return fit_law(
        form,
        points[0],
        ys[kept],
        metric=metric,
        variable=variable,
        floor=floor,
        rows=rows,
        excluded=left,
        noise_floor=noise_floor,
        repeats=repeats.of(kept),
        seed=seed,
        weights=ws[kept] if weights is not None else None,
        rising=rising,
    )


def _weights(form: Form, weights: Any, count: int) -> Array:
    """The weights as an array (count,), 1 where none are given."""
    if weights is None:
        return np.ones(count)
    try:
        found = np.asarray(weights, dtype=float)
    except ValueError:
        found = np.zeros(0)
    if (
        form == "broken_power"
        or found.shape != (count,)
        or not (np.isfinite(found) & (found > 0)).all()
    ):
        raise UserError(
            f"weights: give {count} positive finite numbers, one per row, and a form other than "
            "broken_power, which takes none",
            code="laws.option",
        )
    return found


def _objective(form: Form, name: ObjectiveName, delta: float) -> Objective:
    """The objective of a surface."""
    if name not in OBJECTIVES or not 0 < delta < math.inf:
        raise UserError(
            f"objective {name!r} with delta {delta:g}: use one of {', '.join(OBJECTIVES)}, and a "
            "positive delta",
            code="laws.option",
        )
    if form not in SURFACES and (name, delta) != ("huber_log", DELTA):
        raise UserError(
            f"objective and delta: only surfaces have a choice, and the form is {form}; leave them "
            f"out, or use one of {', '.join(SURFACES)}",
            code="laws.option",
        )
    return Objective(name, delta)


def _checked(
    form: Form, x: Any, y: Any, d: Any, unique: Any, floor: float, metric: str, variable: str
) -> tuple[list[Array], Array]:
    """The variables and the values as arrays (n,)."""
    if form not in FORMS:
        raise UserError(
            f"law form {form!r} is not known; use one of {', '.join(FORMS)}",
            code="laws.form-unknown",
        )
    if (form in SURFACES) != (d is not None) or (form == "repeated") != (unique is not None):
        raise UserError(
            f"the form {form} has the variables {', '.join(VARIABLES[form])}: give parameters as "
            "x, tokens as d and different tokens as unique",
            code="laws.variables",
        )
    try:
        given = [values for values in (x, d, unique) if values is not None]
        columns = [np.asarray(values, dtype=float) for values in given]
        ys = np.asarray(y, dtype=float)
    except ValueError:
        raise UserError(
            f"{metric}: sizes and values must be lists of numbers", code="laws.not-numbers"
        ) from None
    if any(column.ndim != 1 for column in (*columns, ys)):
        raise UserError(
            f"{metric}: give sizes and values as lists of numbers, one per row",
            code="laws.not-numbers",
        )
    if floor < 0:
        raise UserError(
            f"floor: {floor:g} is negative; an irreducible part is at least 0",
            code="laws.floor-negative",
        )
    if any(len(column) != len(ys) for column in columns):
        counts = ", ".join(str(len(column)) for column in columns)
        raise UserError(
            f"{metric}: there are {counts} sizes and {len(ys)} values; give as many of each",
            code="laws.lengths-differ",
        )
    if not all(np.isfinite(column).all() and (column > 0).all() for column in columns):
        raise UserError(
            f"{variable}: sizes must be positive finite numbers", code="laws.not-positive"
        )
    return columns, ys


def to_json(law: LawFit) -> dict[str, Any]:
    """The result as plain values: the fields of a LawFit, `n_rows`, `equation`, and of a test for
    noise that grows with size the p-value, `noise_grows`, and the power, `noise_power`."""
    excluded = [{"row": row, "code": code, "reason": text} for row, code, text in law.excluded]
    more = {"n_rows": len(law.x), "excluded": excluded, "equation": law.equation}
    trend = noise_trend(law)
    return law.to_json() | more | plain({"noise_grows": trend.p, "noise_power": trend.power})
