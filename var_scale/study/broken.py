"""A power law that breaks once (Caballero et al. 2023): two exponents and a smooth passage between them.

In v = ln (y - E) and u = ln x the law is linear but for the place of the break and its width: v = ln a - alpha_1 (u - u0) -
(alpha_2 - alpha_1) g, g = width (ln (1 + exp((u - u0) / width)) - ln 2). So the other three follow by least squares at every place
and width of a grid (variable projection), and the best is refined. Intervals: parametric bootstrap, all draws on the same grid at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from var_scale.study.laws import LEVEL, PARAMETERS, Array, LawFit

WIDTHS = np.geomspace(0.05, 1.5, 12)
"""of the passage, in ln x"""
PLACES = 300
DRAWS = 400


def basis(u: Array, places: Array, widths: Array) -> Array:
    """Columns 1, -(u - u0), -g of each place and width: (..., n, 3)."""
    at = (u - places[..., None]) / widths[..., None]
    bend = widths[..., None] * (np.logaddexp(0, at) - math.log(2))
    return np.stack([np.ones_like(bend), -(u - places[..., None]), -bend], axis=-1)


def fit_broken(x: Array, y: Array, floor: float, seed: int, common: dict[str, Any]) -> LawFit:
    """Fit the broken law to points that `power` could take; `common` are fields of the LawFit."""
    from scipy.optimize import minimize

    u, v = np.log(x), np.log(y - floor)
    order = np.sort(np.unique(u))
    inner = np.linspace(order[1], order[-2], PLACES)  # two sizes at least on each side
    places, widths = (grid.ravel() for grid in np.meshgrid(inner, WIDTHS, indexing="ij"))
    q = np.linalg.qr(basis(u, places, widths))[0]
    scanned = (v**2).sum() - ((v @ q) ** 2).sum(-1)

    def objective(theta: Array) -> float:
        columns = basis(u, theta[:1], np.exp(theta[1:]))[0]
        rest = v - columns @ np.linalg.lstsq(columns, v, rcond=None)[0]
        return float(rest @ rest)

    bounds = [(inner[0], inner[-1]), (math.log(WIDTHS[0]), math.log(WIDTHS[-1]))]
    ends = []
    for cell in np.argsort(scanned)[: 4 * len(WIDTHS) : len(WIDTHS)]:
        found = minimize(objective, [places[cell], math.log(widths[cell])], method="Nelder-Mead", bounds=bounds,
                         options={"xatol": 1e-7, "fatol": 1e-14, "maxiter": 2000})  # fmt: skip
        ends.append((float(found.fun), float(found.x[0]), math.exp(found.x[1]), bool(found.success)))
    best, place, width, success = min(ends)
    columns = basis(u, np.array([place]), np.array([width]))[0]
    level, one, difference = (float(c) for c in np.linalg.lstsq(columns, v, rcond=None)[0])
    edges = [name for name, value, (low, high) in zip(("x_break", "width"), (place, math.log(width)), bounds, strict=True)
             if min(value - low, high - value) < 1e-4]  # fmt: skip
    residuals = v - columns @ np.array([level, one, difference])
    freedom = len(u) - PARAMETERS["broken_power"]
    sd = math.sqrt(best / freedom)
    common = common | {"noise_floor": common["noise_floor"] * float(np.mean(y / (y - floor)))}
    result: dict[str, Any] = {
        "objective": best, "residuals": tuple(residuals), "residual_sd": sd,
        "audit": {"method": "variable projection over place and width of the break, least squares on logs", "active_bounds": edges,
                  "starts": len(places), "agree": sum(value <= best * 1.01 + 1e-12 for value, *_ in ends), "descents": len(ends)},
    }  # fmt: skip
    if not success:
        return LawFit(form="broken_power", status="not-converged", reason="the search for the break did not end", **result, **common)
    if "x_break" in edges:
        reason = "no break inside the sizes: the best one lies at the second from the end; use power or power_floor"
        return LawFit(form="broken_power", status="not-converged", reason=reason, **result, **common)
    if width > 0.98 * WIDTHS[-1]:
        reason = "the passage between the exponents is wider than can be told from a bend; use power or power_floor"
        return LawFit(form="broken_power", status="not-converged", reason=reason, **result, **common)
    params = {"E": floor, "a": math.exp(level), "alpha_1": one, "alpha_2": one + difference, "x_break": math.exp(place), "width": width}
    rng = np.random.default_rng(seed)
    scales = np.minimum(np.sqrt(freedom / rng.chisquare(freedom, DRAWS)), 20)[:, None] * max(sd, common["noise_floor"])
    made = (v - residuals) + scales * rng.standard_normal((DRAWS, len(v)))
    picked = ((made @ q.reshape(len(places), len(u), 3).transpose(1, 0, 2).reshape(len(u), -1)) ** 2).reshape(DRAWS, len(places), 3)
    cells = picked.sum(-1).argmax(1)
    solved = np.array([np.linalg.lstsq(basis(u, places[c : c + 1], widths[c : c + 1])[0], draw, rcond=None)[0]
                       for c, draw in zip(cells, made, strict=True)])  # fmt: skip
    draws = np.column_stack([np.full(DRAWS, floor), np.exp(solved[:, 0]), solved[:, 1], solved[:, 1] + solved[:, 2],
                             np.exp(places[cells]), widths[cells], scales[:, 0]])  # fmt: skip
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    intervals = {}
    for name, column in zip(("a", "alpha_1", "alpha_2", "x_break"), draws[:, 1:5].T, strict=True):
        low, high = np.percentile(column, tails)
        intervals[name] = (min(float(low), params[name]), max(float(high), params[name]))
    return LawFit(form="broken_power", status="converged", params=params, intervals=intervals, draws=tuple(map(tuple, draws.tolist())),
                  **result, **common)  # fmt: skip
