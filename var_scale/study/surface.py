"""The two-variable law L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3; golden test: spec/scaling.md A.2a).

Objective: sum of Huber(1e-3) of ln L - ln fitted. Optimised over (ln A, ln B, ln E, alpha, beta) with ln N and ln D centred, which
removes most of the correlation; L-BFGS-B with the analytic gradient from the best places of a grid of starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from var_scale.study.laws import LEVEL, PARAMETERS, Array, LawFit

DELTA = 1e-3
STARTS = 60
GRID = (np.arange(0, 2.01, 0.5), np.arange(0, 2.01, 0.5), (-1.0, -0.5, 0.0, 0.5, 1.0), np.arange(0, 25.1, 5), np.arange(0, 25.1, 5))
BOUNDS = [(-20.0, 20.0), (-20.0, 20.0), (-15.0, 15.0), (0.0, 3.0), (0.0, 3.0)]


def evaluate(fit: LawFit, n: float | Array, d: float | Array) -> Array:
    """The fitted surface at N parameters and D tokens."""
    p = fit.params
    return np.asarray(p["E"] + p["A"] * np.asarray(n, dtype=float) ** -p["alpha"] + p["B"] * np.asarray(d, dtype=float) ** -p["beta"])


def huber_objective(theta: Array, u: Array, w: Array, v: Array) -> tuple[float, Array]:
    """Sum of Huber(DELTA) / DELTA^2 and its gradient; theta = (ln A, ln B, ln E, alpha, beta), u = ln N, w = ln D, v = ln L."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * u, b - beta * w, np.full_like(u, e)])
    top = terms.max(0)
    weights = np.exp(terms - top)
    total = weights.sum(0)
    weights /= total
    residual = v - top - np.log(total)
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
    slope = -np.clip(residual, -DELTA, DELTA)
    wa, wb, we = slope * weights
    gradient = np.array([wa.sum(), wb.sum(), we.sum(), -(wa * u).sum(), -(wb * w).sum()])
    return float(value) / DELTA**2, gradient / DELTA**2


def fit_chinchilla(
    n: Sequence[float] | Array, d: Sequence[float] | Array, loss: Sequence[float] | Array, *, rows: Sequence[str] = (),
    excluded: Sequence[tuple[str, str, str]] = (), draws: int = 0, seed: int = 0, metric: str = "loss_avg",
) -> LawFit:  # fmt: skip
    """Fit the surface. `draws` > 0 adds bootstrap intervals: runs resampled, each restarted from the optimum.

    `split` among the intervals is beta / (alpha + beta), the exponent a of N ~ C^a in compute-optimal training.
    """
    count = len(loss)
    common: dict[str, Any] = {
        "form": "chinchilla",
        "metric": metric,
        "variable": "N,D",
        "excluded": tuple(excluded),
        "rows": tuple(rows) or tuple(map(str, range(count))),
        "x": tuple(map(float, n)),
        "y": tuple(map(float, loss)),
    }
    ns, ds, losses = (np.asarray(values, dtype=float) for values in (n, d, loss))
    if not all(np.isfinite(values).all() and (values > 0).all() for values in (ns, ds, losses)):
        return LawFit(status="not-converged", reason="a size, token count or loss is not a positive finite number", **common)
    need = PARAMETERS["chinchilla"] + 1
    if count < need or len(set(ns)) < 3 or len(set(ds)) < 3:
        reason = f"{count} runs, {len(set(ns))} sizes, {len(set(ds))} token counts; at least {need} runs with 3 of each are needed"
        return LawFit(status="not-converged", reason=reason, **common)
    u, w, v = np.log(ns), np.log(ds), np.log(losses)
    mu, mw = float(u.mean()), float(w.mean())
    ends = sorted((_descend(start, u - mu, w - mw, v) for start in _starts(u, w, v, mu, mw)), key=lambda end: end[0])
    best, theta = ends[0]
    gradient = huber_objective(theta, u - mu, w - mw, v)[1]
    bounds = [name for name, value, (low, high) in zip(("A", "B", "E", "alpha", "beta"), theta, BOUNDS, strict=True)
              if min(value - low, high - value) < 1e-6]  # fmt: skip
    audit: dict[str, Any] = {"method": "L-BFGS-B, Huber 1e-3", "gradient_norm": float(np.abs(gradient).max()), "active_bounds": bounds,
             "starts": len(ends), "agree": sum(value <= best * (1 + 1e-4) + 1e-12 for value, _ in ends)}  # fmt: skip
    params = _natural(theta, mu, mw)
    fitted = params["E"] + params["A"] * ns ** -params["alpha"] + params["B"] * ds ** -params["beta"]
    residuals = np.log(losses / fitted)
    result: dict[str, Any] = {"objective": best * DELTA**2, "residuals": tuple(residuals), "audit": audit,
                              "residual_sd": math.sqrt(float((residuals**2).sum()) / (count - 5))}  # fmt: skip
    if bounds:
        return LawFit(status="not-converged", reason=f"at a bound: {', '.join(bounds)}", **common, **result)
    if audit["gradient_norm"] > 1e-2 * (1 + best):
        return LawFit(status="not-converged", reason=f"the gradient at the end is {audit['gradient_norm']:.2g}", **common, **result)
    if audit["agree"] < 2:
        return LawFit(status="not-converged", reason=f"only one of {len(ends)} starts reached the best objective", **common, **result)
    intervals = _intervals(theta, u, w, v, mu, mw, draws, seed) if draws else {}
    return LawFit(status="converged", params=params, intervals=intervals, **common, **result)


def _starts(u: Array, w: Array, v: Array, mu: float, mw: float) -> list[Array]:
    """The grid's best places, each in another cell of the exponents first, so that starts are not all neighbours."""
    ranked = []
    for alpha, beta, e, a, b in product(*GRID):
        theta = np.array([a - alpha * mu, b - beta * mw, e, alpha, beta])
        ranked.append((huber_objective(theta, u - mu, w - mw, v)[0], theta))
    ranked.sort(key=lambda item: item[0])
    cells: dict[tuple[float, float], int] = {}
    chosen = []
    for _, theta in ranked:
        cell = (theta[3], theta[4])
        if cells.get(cell, 0) < 3:
            cells[cell] = cells.get(cell, 0) + 1
            chosen.append(theta)
    return chosen[:STARTS]


def _descend(start: Array, u: Array, w: Array, v: Array) -> tuple[float, Array]:
    """L-BFGS-B from one start, restarted until it stops gaining."""
    from scipy.optimize import minimize

    theta, value = np.clip(start, *np.array(BOUNDS).T), math.inf
    for _ in range(5):
        found = minimize(huber_objective, theta, (u, w, v), "L-BFGS-B", jac=True, bounds=BOUNDS,
                         options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9, "maxls": 60})  # fmt: skip
        gain, value, theta = value - found.fun, float(found.fun), found.x
        if gain < 1e-9 * (1 + value):
            break
    return value, theta


def _natural(theta: Array, mu: float, mw: float) -> dict[str, float]:
    a, b, e, alpha, beta = map(float, theta)
    return {"E": math.exp(e), "A": math.exp(a + alpha * mu), "B": math.exp(b + beta * mw), "alpha": alpha, "beta": beta}


def _intervals(theta: Array, u: Array, w: Array, v: Array, mu: float, mw: float, draws: int, seed: int) -> dict[str, tuple[float, float]]:
    from var_scale.study.bootstrap import resamples

    values: dict[str, list[float]] = {}
    for index in resamples(len(u), seed, draws):
        natural = _natural(_descend(theta, u[index] - mu, w[index] - mw, v[index])[1], mu, mw)
        natural["split"] = natural["beta"] / (natural["alpha"] + natural["beta"])
        for name, value in natural.items():
            values.setdefault(name, []).append(value)
    tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    return {name: tuple(map(float, np.percentile(sample, tails))) for name, sample in values.items()}  # type: ignore[misc]
