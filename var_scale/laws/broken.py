"""A power law that breaks once (Caballero et al. 2023, arXiv:2210.14891).

With v = ln (y - E) and u = ln x the law is linear but for the place u0 and the width of the break:
v = ln a - alpha_1 (u - u0) - (alpha_2 - alpha_1) g, g = width (ln (1 + exp((u - u0) / width)) -
ln 2). So the three linear parameters follow by least squares at every place and width of a grid
(variable projection), and the best cells are refined. Intervals are a parametric bootstrap that
refits all draws on the same grid at once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from var_scale.laws.bootstrap import drawn_noise, span
from var_scale.laws.forms import Array
from var_scale.laws.law import LawFit
from var_scale.laws.repeats import Noise

WIDTHS = np.geomspace(0.05, 1.5, 12)
"""Widths of the transition in ln x. A wider one cannot be told from a bend of the whole law."""
PLACES = 300
"""Places of the break in ln x that are scanned."""
DRAWS = 400


def basis(u: Array, places: Array, widths: Array) -> Array:
    """Columns 1, -(u - u0), -g at each place and width of the shape (...): (..., n, 3)."""
    at = (u - places[..., None]) / widths[..., None]
    bend = widths[..., None] * (np.logaddexp(0, at) - math.log(2))
    return np.stack([np.ones_like(bend), -(u - places[..., None]), -bend], axis=-1)


def fit_broken(points: LawFit, floor: float, seed: int) -> LawFit:
    """Fit the broken law to checked points; `floor` is E, below every y."""
    x, y = np.asarray(points.x), np.asarray(points.y)
    u, v = np.log(x), np.log(y - floor)
    sizes = np.unique(u)  # sorted
    inner = np.linspace(sizes[1], sizes[-2], PLACES)  # at least two sizes on each side
    places, widths = (grid.ravel() for grid in np.meshgrid(inner, WIDTHS, indexing="ij"))
    # An orthonormal basis per cell: the explained sum of squares is |q' v|^2, without a solve.
    q = np.linalg.qr(basis(u, places, widths))[0]
    scanned = (v**2).sum() - ((v @ q) ** 2).sum(-1)
    bounds = [(inner[0], inner[-1]), (math.log(WIDTHS[0]), math.log(WIDTHS[-1]))]
    # Neighbouring cells are nearly equal, so every twelfth of the best is a different start.
    cells = np.argsort(scanned)[: 4 * len(WIDTHS) : len(WIDTHS)]
    ends = [_refined(u, v, places[cell], widths[cell], bounds) for cell in cells]
    best, place, width, success = min(ends)
    columns = basis(u, np.array([place]), np.array([width]))[0]
    level, one, difference = (float(c) for c in np.linalg.lstsq(columns, v, rcond=None)[0])
    edges = [
        name
        for name, value, (low, high) in zip(
            ("x_break", "width"), (place, math.log(width)), bounds, strict=True
        )
        if min(value - low, high - value) < 1e-4
    ]
    residuals = v - columns @ np.array([level, one, difference])
    sd = math.sqrt(best / points.freedom)
    # The noise of this form is a share of y - E; that of a run is a share of y.
    ratio = float(np.mean(y / (y - floor)))
    repeats = points.repeats._replace(noise=points.repeats.noise * ratio)
    points = replace(points, noise_floor=points.noise_floor * ratio, repeats=repeats)
    noise = points.noise_of(sd, points.freedom)
    points = replace(
        points,
        noise=noise,
        objective=best,
        residuals=tuple(residuals),
        residual_sd=sd,
        audit={
            "method": "variable projection over place and width of the break, least squares on "
            "logs",
            "active_bounds": edges,
            "starts": len(places),
            "agree": sum(value <= best * 1.01 + 1e-12 for value, *_ in ends),
            "descents": len(ends),
        },
    )
    if not success:
        return points.failed("search_unfinished", "the search for the break did not end")
    if "x_break" in edges:
        return points.failed(
            "no_break",
            "there is no break inside the sizes: the best one lies at the second size from the "
            "end; use power or power_floor",
        )
    if width > 0.98 * WIDTHS[-1]:
        return points.failed(
            "break_too_wide",
            "the transition between the exponents is too wide to tell it from a bend; use power "
            "or power_floor",
        )
    params = {
        "E": floor,
        "a": math.exp(level),
        "alpha_1": one,
        "alpha_2": one + difference,
        "x_break": math.exp(place),
        "width": width,
    }
    draws = _draws((places, widths, q), u, v - residuals, noise, floor, seed)
    free = ("a", "alpha_1", "alpha_2", "x_break")
    intervals = {
        name: span(column, params[name]) for name, column in zip(free, draws[:, 1:5].T, strict=True)
    }
    return points.solved(params=params, intervals=intervals, draw=partial(np.asarray, draws))


def _refined(
    u: Array, v: Array, place: float, width: float, bounds: list[tuple[float, float]]
) -> tuple[float, float, float, bool]:
    """Objective, place, width and success of a search from one cell.

    Without derivatives: the projected objective is cheap, and the points about a break give it
    kinks at a narrow width.
    """
    from scipy.optimize import minimize

    def objective(theta: Array) -> float:
        columns = basis(u, theta[:1], np.exp(theta[1:]))[0]
        rest = v - columns @ np.linalg.lstsq(columns, v, rcond=None)[0]
        return float(rest @ rest)

    found = minimize(
        objective,
        [place, math.log(width)],
        method="Nelder-Mead",
        bounds=bounds,
        options={"xatol": 1e-7, "fatol": 1e-14, "maxiter": 2000},
    )
    return float(found.fun), float(found.x[0]), math.exp(found.x[1]), bool(found.success)


def _draws(
    grid: tuple[Array, Array, Array],
    u: Array,
    fitted: Array,
    noise: Noise,
    floor: float,
    seed: int,
) -> Array:
    """Refits on the grid to simulated logs: rows of NAMES["broken_power"] and the noise.

    Args:
        grid: places and widths (cells,), and the orthonormal bases (cells, n, 3).
        fitted: ln (y - E) of the law at u, (n,).
    """
    places, widths, q = grid
    rng = np.random.default_rng(seed)
    sds = drawn_noise(rng, *noise.point, DRAWS)
    made = fitted + sds[:, None] * rng.standard_normal((DRAWS, len(u)))
    # The bases of all cells side by side: one product projects every draw on every cell, and the
    # cell that explains most of a draw has the smallest residual.
    columns = q.reshape(len(places), len(u), 3).transpose(1, 0, 2).reshape(len(u), -1)
    explained = ((made @ columns) ** 2).reshape(DRAWS, len(places), 3)
    cells = explained.sum(-1).argmax(1)
    solved = np.array(
        [
            np.linalg.lstsq(basis(u, places[c : c + 1], widths[c : c + 1])[0], draw, rcond=None)[0]
            for c, draw in zip(cells, made, strict=True)
        ]
    )
    return np.column_stack(
        [
            np.full(DRAWS, floor),
            np.exp(solved[:, 0]),
            solved[:, 1],
            solved[:, 1] + solved[:, 2],
            np.exp(places[cells]),
            widths[cells],
            sds * noise.run.sd / noise.point.sd,
        ]
    )
