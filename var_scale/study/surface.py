"""The laws of parameters and data: L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, approach 3; golden test: spec/scaling.md
A.2a), and the same with D' of data seen several times (Muennighoff et al. 2023).

Objective: sum of Huber(1e-3) of ln L - ln fitted, over (ln A, ln B, ln E, alpha, beta) and ln r_star, with ln N and ln D centred, which
removes most of the correlation. At 4,624 pairs of exponents the other three follow in closed form (variable projection); from the local
minima of that map and its best places L-BFGS-B with the analytic gradient. With repeated data so from each of a few r_star.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from var_scale.study.laws import LEVEL, NAMES, PARAMETERS, Array, LawFit, effective_data, law_value

DELTA = 1e-3
EXPONENTS = np.geomspace(0.01, 2.5, 68)
"""of N and of D: all pairs are places to start from"""
DESCENTS = 16
PASSES = (1.0, 4.0, 16.0, 64.0)
"""r_star to start from"""
BOUNDS = {"A": (-20.0, 20.0), "B": (-20.0, 20.0), "E": (-15.0, 15.0), "alpha": (0.0, 3.0), "beta": (0.0, 3.0),
          "r_star": (math.log(0.05), math.log(1e4))}  # fmt: skip
MAX_CONDITION = 2000.0
"""of the Jacobian of ln L, columns of length 1; designs that determine the law have 20 to 130, those that do not 2e4 and more"""
Objective = Callable[[Array, Any], tuple[float, Array]]
"""of theta and the rows that count: value and gradient"""


def huber_objective(theta: Array, u: Array, w: Array, v: Array) -> tuple[float, Array]:
    """Sum of Huber(DELTA) / DELTA^2 and its gradient; theta = (ln A, ln B, ln E, alpha, beta), u = ln N, w = ln D, v = ln L."""
    value, gradient, _ = huber_parts(theta, u, w, v)
    return value, gradient


def huber_parts(theta: Array, u: Array, w: Array, v: Array) -> tuple[float, Array, Array]:
    """The objective, its gradient, and its derivative by each ln D."""
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
    return float(value) / DELTA**2, gradient / DELTA**2, -beta * wb / DELTA**2


def fit_surface(
    n: Sequence[float] | Array, d: Sequence[float] | Array, loss: Sequence[float] | Array, unique: Sequence[float] | Array | None = None, *,
    rows: Sequence[str] = (), excluded: Sequence[tuple[str, str, str]] = (), draws: int = 0, seed: int = 0, metric: str = "loss_avg",
) -> LawFit:  # fmt: skip
    """Fit the surface, with `unique` (different tokens among each d) that of repeated data. `draws` > 0 adds bootstrap intervals.

    `split` among the intervals is beta / (alpha + beta), the exponent a of N ~ C^a in compute-optimal training without repetition.
    """
    form = "chinchilla" if unique is None else "repeated"
    ns, ds, losses = (np.asarray(values, dtype=float) for values in (n, d, loss))
    us = np.full_like(ds, np.inf) if unique is None else np.asarray(unique, dtype=float)
    common: dict[str, Any] = {
        "form": form, "metric": metric, "variable": "N,D" if unique is None else "N,D,U", "excluded": tuple(excluded),
        "rows": tuple(rows) or tuple(map(str, range(len(losses)))), "x": tuple(ns.tolist()), "y": tuple(losses.tolist()),
        "d": tuple(ds.tolist()), "unique": () if unique is None else tuple(us.tolist()),
    }  # fmt: skip
    if reason := _unfit(form, ns, ds, losses, us):
        return LawFit(status="not-converged", reason=reason, **common)
    u, w, v = np.log(ns), np.log(ds), np.log(losses)
    mu, mw = float(u.mean()), float(w.mean())

    def objective(theta: Array, rows: Any = slice(None)) -> tuple[float, Array]:
        if unique is None:
            return huber_objective(theta, u[rows] - mu, w[rows] - mw, v[rows])
        data, slope = _repeated(ds[rows], us[rows], math.exp(theta[5]))
        value, gradient, by_data = huber_parts(theta[:5], u[rows] - mu, data - mw, v[rows])
        return value, np.append(gradient, by_data @ slope)

    if unique is None:
        starts = _starts(u - mu, w - mw, v, DESCENTS)
    else:
        starts = [np.append(start, math.log(r)) for r in PASSES
                  for start in _starts(u - mu, _repeated(ds, us, r)[0] - mw, v, DESCENTS // 2)]  # fmt: skip
    names = ("A", "B", "E", "alpha", "beta", "r_star")[: PARAMETERS[form]]
    ends = sorted((_descend(objective, start) for start in starts), key=lambda end: end[0])
    best, theta = ends[0]
    gradient = objective(theta)[1]
    bounds = [name for name, value in zip(names, theta, strict=True) if min(value - BOUNDS[name][0], BOUNDS[name][1] - value) < 1e-6]
    audit: dict[str, Any] = {"method": "variable projection over the exponents, then L-BFGS-B, Huber 1e-3",
             "gradient_norm": float(np.abs(gradient).max()), "active_bounds": bounds,
             "starts": len(EXPONENTS) ** 2 * (1 if unique is None else len(PASSES)), "descents": len(ends),
             "agree": sum(value <= best * (1 + 1e-4) + 1e-12 for value, _ in ends)}  # fmt: skip
    params = _natural(theta, mu, mw)
    params["split"] = params["beta"] / (params["alpha"] + params["beta"])
    fitted = law_value(form, params, ns, ds, us)
    residuals = np.log(losses / fitted)
    sd = math.sqrt(float((residuals**2).sum()) / (len(losses) - PARAMETERS[form]))
    result: dict[str, Any] = {"objective": best * DELTA**2, "residuals": tuple(residuals), "audit": audit, "residual_sd": sd}
    if bounds:
        free = "r_star" in bounds and theta[5] > 0
        lost = "r_star is at its upper bound: these rows show nothing lost by repetition; use chinchilla, or add runs of one pass"
        why = lost if free else f"at a bound: {', '.join(bounds)}"
        return LawFit(status="not-converged", reason=why, **common, **result)
    if audit["gradient_norm"] > 1e-2 * (1 + best):
        return LawFit(status="not-converged", reason=f"the gradient at the end is {audit['gradient_norm']:.2g}", **common, **result)
    audit["condition"] = _condition(form, params, ns, ds, us)
    if audit["condition"] > MAX_CONDITION:
        return LawFit(status="not-converged", reason=_undetermined(form, ds, us), **common, **result)
    if audit["agree"] < 2:
        return LawFit(status="not-converged", reason=f"only one of {len(ends)} descents reached the best objective", **common, **result)
    made: Array = np.empty((0, 0))
    intervals: dict[str, tuple[float, float]] = {}
    if draws:
        made = _draws(objective, theta, sd, len(losses), (mu, mw), draws, seed)
        columns = dict(zip(NAMES[form], made.T, strict=False))
        columns["split"] = columns["beta"] / (columns["alpha"] + columns["beta"])
        tails = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
        for name, sample in columns.items():
            low, high = (float(end) for end in np.percentile(sample, tails))
            intervals[name] = (min(low, params[name]), max(high, params[name]))
        intervals = _open(intervals, float(losses.min()))
    return LawFit(status="converged", params=params, intervals=intervals, draws=tuple(map(tuple, made.tolist())), **common, **result)


def _unfit(form: str, n: Array, d: Array, loss: Array, unique: Array) -> str:
    """Why these rows cannot determine the law; empty when they can."""
    if not (len(n) == len(d) == len(loss) == len(unique)):
        return f"{len(n)} sizes, {len(d)} token counts, {len(loss)} losses, {len(unique)} counts of different tokens; give as many of each"
    if not all(np.isfinite(values).all() and (values > 0).all() for values in (n, d, loss)) or not (unique > 0).all():
        return "a size, token count or loss is not a positive finite number"
    need = PARAMETERS[form] + 1
    if len(n) < need or len(set(n.tolist())) < 3 or len(set(d.tolist())) < 3:
        counts = f"{len(n)} runs, {len(set(n.tolist()))} sizes, {len(set(d.tolist()))} token counts"
        return f"{counts}; at least {need} runs with 3 of each are needed"
    if _together(n, d):
        return "sizes and tokens go together, so nothing tells their parts apart; train sizes for several lengths"
    if form == "repeated" and len(set(d[d > 1.01 * unique].tolist())) < 2:
        return "fewer than two token counts repeat their data; use chinchilla"
    return ""


def _condition(form: str, params: dict[str, float], n: Array, d: Array, unique: Array) -> float:
    """Condition number of the derivatives of ln L by ln E, ln A, ln B, alpha, beta (and ln r_star), N and D about their means: how far the
    rows are from telling the parameters apart, whatever the noise."""
    total = law_value(form, params, n, d, unique)
    data = effective_data(d, unique, params["r_star"]) if form == "repeated" else d
    sized, fed = params["A"] * n ** -params["alpha"] / total, params["B"] * data ** -params["beta"] / total
    columns = [params["E"] / total, sized, fed, -sized * (np.log(n) - np.log(n).mean()), -fed * (np.log(data) - np.log(data).mean())]
    if form == "repeated":
        columns.append(-params["beta"] * fed * _repeated(d, unique, params["r_star"])[1])
    matrix = np.stack(columns, axis=1)
    lengths = np.linalg.norm(matrix, axis=0)
    if not (lengths > 0).all():
        return math.inf
    values = np.linalg.svd(matrix / lengths, compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def _together(n: Array, d: Array) -> bool:
    """Whether D is a power of N, but for a hundredth of its variance: a ladder of one number of tokens a parameter, say."""
    return float(np.corrcoef(np.log(n), np.log(d))[0, 1]) ** 2 > 0.99


def _undetermined(form: str, d: Array, unique: Array) -> str:
    """Why the parameters cannot be told apart, as far as the design shows it."""
    text = "these rows do not determine the law, other parameters fit them as well"
    if form == "repeated":
        passes = sorted({round(float(p), 3) for p in d / unique})
        return f"{text}: with {passes[0]:g} to {passes[-1]:g} passes, {len(passes)} lengths; add lengths, among them one of a pass or less"
    return f"{text}: add sizes or lengths further apart"


def _open(intervals: dict[str, tuple[float, float]], least: float) -> dict[str, tuple[float, float]]:
    """Ends where a search bound stopped the draws are open: 0 or infinite, and with an exponent its coefficient."""
    found = dict(intervals)
    for exponent, factor in (("alpha", "A"), ("beta", "B")):
        low, high = found[exponent]
        if high > 0.98 * BOUNDS[exponent][1]:
            found[exponent], found[factor] = (low, math.inf), (found[factor][0], math.inf)
        if low < 1e-3:
            found[exponent], found[factor] = (0.0, found[exponent][1]), (0.0, found[factor][1])
    if found["E"][0] < 1e-3 * least:
        found["E"] = (0.0, found["E"][1])
    if "r_star" in found and math.log(found["r_star"][1]) > 0.98 * BOUNDS["r_star"][1]:
        found["r_star"] = (found["r_star"][0], math.inf)
    return found


def _repeated(d: Array, unique: Array, r_star: float) -> tuple[Array, Array]:
    """ln D' of each row and its derivative by ln r_star."""
    data = effective_data(d, unique, r_star)
    share = np.maximum(d / unique - 1, 0) / r_star
    slope = np.where(share > 0, unique * r_star * (1 - np.exp(-share) * (1 + share)) / data, 0.0)
    return np.log(data), slope


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


def _starts(u: Array, w: Array, v: Array, count: int) -> list[Array]:
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
    ranked = np.argsort(objective, axis=None)[: count // 2 * 20 : 20]
    places = sorted({tuple(map(int, place)) for place in (*minima, *(np.unravel_index(k, objective.shape) for k in ranked))},
                    key=lambda place: objective[place])  # fmt: skip
    small = 1e-6 * float(np.median(loss))
    starts = []
    for i, j in places[:count]:
        e, a, b = np.log(np.maximum(coefficients[i, j], small))
        starts.append(np.array([a, b, e, EXPONENTS[i], EXPONENTS[j]]))
    return starts


def _descend(objective: Objective, start: Array, rows: Any = slice(None)) -> tuple[float, Array]:
    """L-BFGS-B from one start, restarted until it stops gaining."""
    from scipy.optimize import minimize

    bounds = list(BOUNDS.values())[: len(start)]
    theta, value = np.clip(start, *np.array(bounds).T), math.inf
    for _ in range(5):
        found = minimize(objective, theta, (rows,), "L-BFGS-B", jac=True, bounds=bounds,
                         options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9, "maxls": 60})  # fmt: skip
        gain, value, theta = value - found.fun, float(found.fun), found.x
        if gain < 1e-9 * (1 + value):
            break
    return value, theta


def _natural(theta: Array, mu: float, mw: float) -> dict[str, float]:
    a, b, e, alpha, beta = map(float, theta[:5])
    params = {"E": math.exp(e), "A": math.exp(a + alpha * mu), "B": math.exp(b + beta * mw), "alpha": alpha, "beta": beta}
    return params | ({"r_star": math.exp(theta[5])} if len(theta) > 5 else {})


def _draws(
    objective: Objective, theta: Array, sd: float, count: int, means: tuple[float, float], draws: int, seed: int
) -> Array:  # fmt: skip
    """Refits from the optimum to runs drawn with replacement: rows of the parameters in the order of NAMES and the noise of a run, which
    varies as that of so few points does."""
    from var_scale.study.bootstrap import resamples

    rng = np.random.default_rng(seed)
    freedom = count - len(theta)
    made = []
    for index in resamples(count, seed, draws):
        natural = _natural(_descend(objective, theta, index)[1], *means)
        made.append([*natural.values(), sd * min(math.sqrt(freedom / rng.chisquare(freedom)), 20)])
    return np.array(made)
