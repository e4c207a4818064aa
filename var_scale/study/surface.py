"""The two-variable law L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3; golden test: spec/scaling.md A.2a).

Objective: sum of Huber(1e-3) of ln L - ln fitted, over (ln A, ln B, ln E, alpha, beta) with ln N and ln D centred, which removes most of
the correlation. At 4,624 pairs of exponents the other three follow in closed form (variable projection); from the local minima of that map
and its best places L-BFGS-B with the analytic gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from var_scale.study.laws import LEVEL, PARAMETERS, Array, LawFit

DELTA = 1e-3
EXPONENTS = np.geomspace(0.01, 2.5, 68)
"""of N and of D: all pairs are places to start from"""
DESCENTS = 16
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
    ends = sorted((_descend(start, u - mu, w - mw, v) for start in _starts(u - mu, w - mw, v)), key=lambda end: end[0])
    best, theta = ends[0]
    gradient = huber_objective(theta, u - mu, w - mw, v)[1]
    bounds = [name for name, value, (low, high) in zip(("A", "B", "E", "alpha", "beta"), theta, BOUNDS, strict=True)
              if min(value - low, high - value) < 1e-6]  # fmt: skip
    audit: dict[str, Any] = {"method": "variable projection over the exponents, then L-BFGS-B, Huber 1e-3",
             "gradient_norm": float(np.abs(gradient).max()), "active_bounds": bounds,
             "starts": len(EXPONENTS) ** 2, "descents": len(ends),
             "agree": sum(value <= best * (1 + 1e-4) + 1e-12 for value, _ in ends)}  # fmt: skip
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
        return LawFit(status="not-converged", reason=f"only one of {len(ends)} descents reached the best objective", **common, **result)
    intervals = _intervals(theta, u, w, v, mu, mw, draws, seed) if draws else {}
    return LawFit(status="converged", params=params, intervals=intervals, **common, **result)


def _scan(u: Array, w: Array, loss: Array, weight: Array) -> tuple[Array, Array]:
    """Variable projection: at each pair of exponents (P, Q) of the grid the best E, A, B >= 0 of L = E + A e^(-alpha u) + B e^(-beta w),
    u and w centred, by weighted least squares of relative errors; from inner products alone, so that thousands of pairs cost milliseconds.
    Returns the coefficients (P, Q, 3) and the objective (P, Q)."""
    one = np.sqrt(weight) / loss
    sized, fed = (np.exp(-EXPONENTS[:, None] * x) * one for x in (u, w))
    gram, right = np.empty((len(EXPONENTS), len(EXPONENTS), 3, 3)), np.empty((len(EXPONENTS), len(EXPONENTS), 3))
    root = np.sqrt(weight)
    products = {(0, 0): one @ one, (0, 1): (sized @ one)[:, None], (0, 2): (fed @ one)[None], (1, 1): (sized**2).sum(1)[:, None],
                (1, 2): sized @ fed.T, (2, 2): (fed**2).sum(1)[None]}  # fmt: skip
    for (row, column), value in products.items():
        gram[..., row, column] = gram[..., column, row] = value
    for row, value in enumerate((one @ root, (sized @ root)[:, None], (fed @ root)[None])):
        right[..., row] = value
    best, objective = np.zeros_like(right), np.full(right.shape[:2], np.inf)
    total = float(weight.sum())
    for kept in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):  # coefficients that are not at 0
        part = gram[..., kept, :][..., kept] + 1e-12 * np.eye(len(kept)) * gram[..., kept, kept][..., None, :]
        found = np.zeros_like(right)
        found[..., kept] = np.linalg.solve(part, right[..., kept][..., None])[..., 0]
        value = total - (found * right).sum(-1)
        better = (found >= 0).all(-1) & (value < objective - 1e-12)
        best[better], objective[better] = found[better], value[better]
    return best, objective


def _starts(u: Array, w: Array, v: Array) -> list[Array]:
    """From a scan of all pairs of exponents the local minima and the best places besides, as theta; the scan is made twice, the second time
    with little weight for what the first misses by far, so that a few diverged runs do not choose the place."""
    loss, weight = np.exp(v), np.ones_like(v)
    for _ in range(2):
        coefficients, objective = _scan(u, w, loss, weight)
        i, j = map(int, np.unravel_index(objective.argmin(), objective.shape))
        fitted = coefficients[i, j] @ np.stack([np.ones_like(u), np.exp(-EXPONENTS[i] * u), np.exp(-EXPONENTS[j] * w)])
        miss = np.abs(np.log(np.maximum(fitted, 1e-300)) - v)
        weight = np.minimum(1.0, 2 * np.median(miss) / np.maximum(miss, 1e-12)) ** 2
    padded = np.pad(objective, 1, constant_values=np.inf)
    around = [padded[1 + a : 1 + a + len(EXPONENTS), 1 + b : 1 + b + len(EXPONENTS)] for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    minima = np.argwhere((objective <= np.min(around, axis=0)) & np.isfinite(objective))
    ranked = np.argsort(objective, axis=None)[: DESCENTS // 2 * 20 : 20]
    places = sorted({tuple(map(int, place)) for place in (*minima, *(np.unravel_index(k, objective.shape) for k in ranked))},
                    key=lambda place: objective[place])  # fmt: skip
    small = 1e-6 * float(np.median(loss))
    starts = []
    for i, j in places[:DESCENTS]:
        e, a, b = np.log(np.maximum(coefficients[i, j], small))
        starts.append(np.array([a, b, e, EXPONENTS[i], EXPONENTS[j]]))
    return starts


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
