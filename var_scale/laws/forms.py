"""The law forms: their equations, parameters and variables.

power          L(x) = E + a x^-alpha, E fixed (0 unless given). The VAR paper (arXiv:2404.02905)
               writes (beta X)^-alpha with X = x / unit, so a = (beta / unit)^-alpha.
power_floor    The same with E >= 0 fitted.
broken_power   L(x) = E + a (x/x_break)^-alpha_1
                      ((1 + (x/x_break)^(1/width)) / 2)^(-(alpha_2 - alpha_1) width), E fixed:
               exponent alpha_1 far below the break and alpha_2 far above it
               (Caballero et al. 2023, arXiv:2210.14891, one break).
chinchilla     L(N, D) = E + A N^-alpha + B D^-beta
               (Hoffmann et al. 2022, arXiv:2203.15556, approach 3).
tied           The same with alpha = beta
               (Gadre et al. 2024, arXiv:2403.08540: a C^-eta M^eta + b C^-eta M^-eta with
               C = 6 N D and M = D / N, so alpha = 2 eta).
repeated       L(N, D, U) = E + A N^-alpha + B D'^-beta for D tokens of which only U are different:
               D' = U + U R (1 - exp(-(D/U - 1) / R)), R = r_star
               (Muennighoff et al. 2023, arXiv:2305.16264). About r_star further passes over the
               data are worth nearly as much as new data; after that the gain fades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["power", "power_floor", "broken_power", "chinchilla", "tied", "repeated"]
FORMS: tuple[Form, ...] = (
    "power",
    "power_floor",
    "broken_power",
    "chinchilla",
    "tied",
    "repeated",
)
SURFACES = ("chinchilla", "tied", "repeated")
"""Forms of parameters and tokens."""
Array = NDArray[np.float64]
VARIABLES: dict[str, tuple[str, ...]] = {
    "power": ("x",),
    "power_floor": ("x",),
    "broken_power": ("x",),
    "chinchilla": ("x", "d"),
    "tied": ("x", "d"),
    "repeated": ("x", "d", "unique"),
}
UNITS = {"N": 1e9, "C": 1e15}
"""Unit of X in the paper's (beta X)^-alpha: billions of parameters, PFLOPs."""
PARAMETERS: dict[str, int] = {
    "power": 2,
    "power_floor": 3,
    "broken_power": 5,
    "chinchilla": 5,
    "tied": 4,
    "repeated": 6,
}
"""Fitted parameters of each form."""
NAMES: dict[str, tuple[str, ...]] = {
    "power": ("E", "a", "alpha"),
    "power_floor": ("E", "a", "alpha"),
    "broken_power": ("E", "a", "alpha_1", "alpha_2", "x_break", "width"),
    "chinchilla": ("E", "A", "B", "alpha", "beta"),
    "tied": ("E", "A", "B", "alpha"),
    "repeated": ("E", "A", "B", "alpha", "beta", "r_star"),
}
"""All parameters of each form: the columns of its bootstrap draws."""
LEVEL = 0.95
"""Confidence level of every interval unless another one is requested."""


def t_factor(level: float, freedom: float) -> float:
    """Half the width of Student's central interval of that level, in standard errors."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.5 + level / 2))


def effective_data(d: float | Array, unique: float | Array, r_star: float | Array) -> Array:
    """Effective tokens D' of the form `repeated`, for d tokens of which `unique` are different."""
    d, unique = np.asarray(d, dtype=float), np.asarray(unique, dtype=float)
    extra = np.maximum(d / unique - 1, 0)
    # expm1 keeps the digits of a repetition that is small beside r_star.
    return np.asarray(np.where(d > unique, unique * (1 - r_star * np.expm1(-extra / r_star)), d))


def law_value(
    form: str,
    p: Mapping[str, Any],
    x: float | Array,
    d: float | Array = 1.0,
    unique: float | Array = 1.0,
) -> Array:
    """Evaluate a law.

    Args:
        form: one of FORMS.
        p: its parameters by name: numbers, or columns that broadcast against the places.
        x: parameters or FLOPs; N for a surface.
        d: tokens, for a surface.
        unique: different tokens among them, for the form `repeated`.

    Returns:
        The value in the unit of the metric, of the broadcast shape of all arguments.
    """
    x, d = np.asarray(x, dtype=float), np.asarray(d, dtype=float)
    if form in SURFACES:
        data = effective_data(d, unique, p["r_star"]) if form == "repeated" else d
        beta = p["alpha"] if form == "tied" else p["beta"]
        return np.asarray(p["E"] + p["A"] * x ** -p["alpha"] + p["B"] * data**-beta)
    if form == "broken_power":
        # In logs, because (x / x_break)^(1 / width) overflows far from a sharp break.
        u = np.log(x / p["x_break"])
        bend = p["width"] * (np.logaddexp(0, u / p["width"]) - math.log(2))
        exponent = -p["alpha_1"] * u - (p["alpha_2"] - p["alpha_1"]) * bend
        return np.asarray(p["E"] + p["a"] * np.exp(exponent))
    return np.asarray(p["E"] + p["a"] * x ** -p["alpha"])


def paper_beta(a: float, alpha: float, unit: float) -> float:
    """beta of (beta X)^-alpha with X = x / unit, from a x^-alpha: beta = unit a^(-1/alpha).

    NaN where beta is beyond the range of a float, as it is for very small exponents.
    """
    exponent = math.log(unit) - math.log(a) / alpha
    return math.exp(exponent) if abs(exponent) < 700 else math.nan
