"""The F test of a power law against the same law with a floor, which it contains as E = 0."""

from __future__ import annotations

import math

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.law import LawFit


def floor_test(fit_power: LawFit, fit_floor: LawFit) -> float:
    """p-value of the power law within power_floor, for the same points.

    F is the gain in the sum of squares of ln y over the squared noise of the law with the floor,
    with 1 degree of freedom and those of this noise. Against E = 0 the test is
    one-sided, because E cannot be negative: half the p-value of F. AICc needs more points for the
    same question.

    Returns:
        The p-value; NaN where one fit did not converge.

    Raises:
        UserError: code `laws.nested-forms` for other forms, or fits of different points.
    """
    from scipy.special import fdtrc

    if (fit_power.form, fit_floor.form) != ("power", "power_floor") or (
        (fit_power.x, fit_power.y) != (fit_floor.x, fit_floor.y)
    ):
        raise UserError(
            "floor test: a fit of the form power and one of power_floor, both of the same points, "
            f"are needed (forms {fit_power.form} and {fit_floor.form}, {len(fit_power.x)} and "
            f"{len(fit_floor.x)} points)",
            code="laws.nested-forms",
        )
    if not (fit_power.converged and fit_floor.converged):
        return math.nan
    x, y = np.asarray(fit_power.x), np.asarray(fit_power.y)
    straight, bent = (
        float(fit.given_weights() @ np.log(y / fit.predict(x)) ** 2)
        for fit in (fit_power, fit_floor)
    )
    # Residuals of 1e-12 are rounding.
    spread = max(math.sqrt(bent / fit_floor.freedom), 1e-12)
    noise = fit_floor.noise_of(spread, fit_floor.freedom).point
    p = float(fdtrc(1, noise.freedom, max(straight - bent, 0.0) / noise.sd**2))
    if fit_power.params["E"] > 0:
        return p
    return p / 2 if fit_floor.params["E"] > 0 else 1.0
