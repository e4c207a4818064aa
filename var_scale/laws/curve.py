"""Fits of one metric against one variable: checks of the points and the choice of the form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.broken import fit_broken
from var_scale.laws.forms import PARAMETERS, Array, Form
from var_scale.laws.law import NOISE_FLOOR, LawFit
from var_scale.laws.power import fit_power
from var_scale.laws.power_floor import fit_power_floor
from var_scale.laws.repeats import NONE, Repeats


def fit_law(
    form: Form,
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    *,
    metric: str = "loss",
    variable: str = "N",
    floor: float = 0.0,
    rows: Sequence[str] = (),
    excluded: Sequence[tuple[str, str, str]] = (),
    noise_floor: float = NOISE_FLOOR,
    repeats: Repeats = NONE,
    seed: int = 0,
    weights: Sequence[float] | Array | None = None,
    rising: bool = False,
) -> LawFit:
    """Fit y(x) by `power` or `broken_power` with a given floor, or by `power_floor`.

    Args:
        x: sizes, compute or tokens, (n,).
        y: values of the metric, (n,).
        variable: what x is; N and C give the paper's beta in its units.
        floor: the irreducible part E in the unit of y; power_floor fits its own.
        rows: names of the points.
        excluded: rows left out before, kept with the result.
        noise_floor: smallest relative noise per run that intervals assume.
        repeats: runs of which each point is the mean, and the noise between them.
        seed: seed of the bootstrap.
        weights: of the points, (n,), for power and power_floor; the variance of the noise is taken
            to be inverse to them.
        rising: whether the form power must rise instead of fall.

    Returns:
        A LawFit. Points that cannot determine the law and fits that fail their audit have status
        not-converged, a code and a reason; nothing raises for them.

    Raises:
        UserError: code `laws.form-unknown` or `laws.lengths-differ`.
    """
    if form not in ("power", "power_floor", "broken_power"):
        raise UserError(
            f"law form {form!r} is not a law of one variable; use power, power_floor or "
            "broken_power",
            code="laws.form-unknown",
        )
    if len(x) != len(y):
        raise UserError(
            f"{metric}: there are {len(x)} sizes and {len(y)} values; give as many of each",
            code="laws.lengths-differ",
        )
    scaled = None if weights is None else np.asarray(weights, dtype=float)
    points = LawFit(
        form,
        metric,
        variable,
        x=tuple(map(float, x)),
        y=tuple(map(float, y)),
        noise_floor=noise_floor,
        repeats=repeats,
        rows=tuple(rows) or tuple(str(i) for i in range(len(x))),
        excluded=tuple(excluded),
        row_weights=() if scaled is None else tuple((scaled / scaled.mean()).tolist()),
    )
    if problem := _unfit(form, np.asarray(points.x), np.asarray(points.y), floor):
        return points.failed(*problem)
    if form == "broken_power":
        return fit_broken(points, floor, seed)
    if form == "power":
        return fit_power(points, floor, rising)
    return fit_power_floor(points, seed)


def _unfit(form: Form, x: Array, y: Array, floor: float) -> tuple[str, str] | None:
    """Code and reason why these points cannot determine the law; None when they can."""
    need = PARAMETERS[form] + 1
    sizes = len(set(x.tolist()))
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        return "not_positive", "a size or value is not a positive finite number"
    if sizes < need:
        text = f"{sizes} size{'' if sizes == 1 else 's'} for {PARAMETERS[form]} parameters"
        return "too_few", f"{text}; an error estimate needs at least {need}"
    if form != "power_floor" and floor >= y.min():
        text = f"the assumed floor {floor:g} is not below the smallest value {y.min():g}"
        return "floor_above_values", text
    return None


def floor_strip(
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    fractions: Sequence[float] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
) -> list[dict[str, float]]:
    """How exponent and correlation move with an ASSUMED floor, a fraction of the smallest value.

    Returns:
        One dictionary with E, alpha, r and residual_sd per fraction whose power law converges.
    """
    fits = [fit_law("power", x, y, floor=fraction * min(y)) for fraction in fractions]
    return [
        {
            "E": fit.params["E"],
            "alpha": fit.params["alpha"],
            "r": fit.r,
            "residual_sd": fit.residual_sd,
        }
        for fit in fits
        if fit.converged
    ]
