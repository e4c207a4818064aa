"""The power law with a given floor: least squares in logs, with exact intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from var_scale.laws.forms import LEVEL, UNITS, Array, paper_beta, t_factor
from var_scale.laws.law import LawFit


def fit_power(points: LawFit, floor: float, rising: bool = False) -> LawFit:
    """Fit ln (y - E) = ln a - alpha ln x by least squares to checked points.

    The noise is a share of y, so ln (y - E) is noisier where more of y is irreducible. The
    estimate does not weight for it (the weights depend on the law itself, and the estimate stays
    unbiased without them), but the intervals do: variance of each log over that of ln y is
    (y / (y - E))^2. Given weights of the rows count in both.

    A law that must rise has alpha < 0 and the parameter `exponent` = -alpha.
    """
    u, v = np.log(np.asarray(points.x)), np.log(np.asarray(points.y) - floor)
    given = points.given_weights()
    share = given / given.sum()
    n, middle = len(u), float(share @ u)
    spread = float(given @ (u - middle) ** 2)
    tilt = given * (u - middle) / spread  # the slope is tilt @ v
    slope = float(tilt @ v)
    intercept = float(share @ v) - slope * middle
    residuals = v - intercept - slope * u
    reducible = np.exp(intercept + slope * u)
    variance = ((floor + reducible) / reducible) ** 2 / given
    # The expected square of residual i is sd^2 variance_i (1 - leverage_i), to first order; with
    # E = 0 the weighted sum of these factors is n - 2.
    left = given * (1 - share - tilt * (u - middle))
    sd = math.sqrt(float(given @ residuals**2) / float(variance @ left))
    scatter = points.noise_of(sd, n - 2)
    alpha, a = -slope, math.exp(intercept)
    result: dict[str, Any] = {
        "objective": float(given @ residuals**2),
        "residuals": tuple(residuals),
        "residual_sd": sd,
        "noise": scatter,
        "r": pearson(u, v),
    }
    if (alpha >= 0) if rising else (alpha <= 0):
        verb = "rise" if rising else "fall"
        reason = f"the value does not {verb} with size (exponent {alpha:.3g})"
        return points.failed("no_decay", reason, **result)
    # Slope and intercept are weighted sums of the logs v_i, so their variances are the sums of the
    # squared weights times those of the logs.
    noise = t_factor(LEVEL, scatter.point.freedom) * scatter.point.sd
    half = noise * math.sqrt(float(variance @ tilt**2))
    half_a = noise * math.sqrt(float(variance @ (share - middle * tilt) ** 2))
    params = {"E": floor, "a": a, "alpha": alpha}
    intervals = {
        "alpha": (alpha - half, alpha + half),
        "a": (a * math.exp(-half_a), a * math.exp(half_a)),
    }
    if rising:
        params["exponent"] = -alpha
        intervals["exponent"] = (-alpha - half, -alpha + half)
    return points.solved(
        params=params if rising else named(floor, a, alpha, points.variable),
        intervals=intervals,
        audit={
            "method": "least squares on logs, closed form",
            "gradient_norm": float(np.hypot(given @ residuals, given @ (residuals * u))),
            "active_bounds": [],
            "starts": 1,
            "agree": 1,
        },
        **result,
    )


def named(floor: float, a: float, alpha: float, variable: str) -> dict[str, float]:
    """Parameters by name, with beta as the paper writes the law."""
    beta = paper_beta(a, alpha, UNITS.get(variable, 1.0))
    return {"E": floor, "a": a, "alpha": alpha, "beta": beta}


def pearson(u: Array, v: Array) -> float:
    """Pearson's correlation of two arrays (n,); NaN when one of them does not vary."""
    du, dv = u - u.mean(), v - v.mean()
    scale = math.sqrt(float((du**2).sum() * (dv**2).sum()))
    return float((du * dv).sum()) / scale if scale > 0 else math.nan
