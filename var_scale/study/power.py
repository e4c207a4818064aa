"""Fits of one metric against one variable: `power` by least squares on logs, `power_floor` by variable projection, with intervals of its
floor and exponent by profile likelihood.

Every function returns a LawFit; too few points, a floor above the data or an exponent at its bound give status not-converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from var_scale.errors import UserError
from var_scale.study.laws import LEVEL, PARAMETERS, UNITS, Array, Form, LawFit, paper_beta, t_factor

ALPHA_BOUNDS = (0.003, 4.0)
NOISE_FLOOR = 5e-4
"""Smallest relative run-to-run deviation assumed in intervals: 0.0007 nats at 2.66 (three seeds of DeepMind's 130M) is 3e-4."""


def fit_law(
    form: Form, x: Sequence[float], y: Sequence[float], *, metric: str = "loss", variable: str = "N", floor: float = 0.0,
    rows: Sequence[str] = (), excluded: Sequence[tuple[str, str, str]] = (), noise_floor: float = NOISE_FLOOR, seed: int = 0,
) -> LawFit:  # fmt: skip
    """Fit y(x) by `power` or `broken_power` (with the fixed `floor`), or `power_floor`. `rows` names the points, `seed` the bootstrap."""
    if form not in ("power", "power_floor", "broken_power"):
        raise UserError(f"law form {form!r} is not known here; use power, power_floor or broken_power")
    if len(x) != len(y):
        raise UserError(f"{metric}: {len(x)} sizes and {len(y)} values; give as many of each")
    common: dict[str, Any] = {
        "metric": metric, "variable": variable, "x": tuple(map(float, x)), "y": tuple(map(float, y)), "noise_floor": noise_floor,
        "rows": tuple(rows) or tuple(str(i) for i in range(len(x))), "excluded": tuple(excluded),
    }  # fmt: skip
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if reason := _unfit(form, xs, ys, floor):
        return LawFit(form=form, status="not-converged", reason=reason, **common)
    if form == "broken_power":
        from var_scale.study.broken import fit_broken

        return fit_broken(xs, ys, floor, seed, common)
    return _power(xs, ys, floor, common) if form == "power" else _power_floor(xs, ys, seed, common)


def _unfit(form: Form, x: Array, y: Array, floor: float) -> str:
    """Why these points cannot determine the law; empty when they can."""
    need = PARAMETERS[form] + 1
    sizes = len(set(x.tolist()))
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        return "a size or value is not a positive finite number"
    if sizes < need:
        return (
            f"{sizes} size{'' if sizes == 1 else 's'} for {PARAMETERS[form]} parameters; at least {need} are needed for an error estimate"
        )
    if form != "power_floor" and floor >= y.min():
        return f"the assumed floor {floor:g} is not below the smallest value {y.min():g}"
    return ""


def _power(x: Array, y: Array, floor: float, common: dict[str, Any]) -> LawFit:
    """ln (y - E) = ln a - alpha ln x by ordinary least squares; t intervals with n - 2 degrees of freedom. Noise is a share of y, so that
    of ln (y - E) is larger where more of y is irreducible: the intervals take it so."""
    u, v = np.log(x), np.log(y - floor)
    n, spread = len(u), float(((u - u.mean()) ** 2).sum())
    slope = float(((u - u.mean()) * (v - v.mean())).sum() / spread)
    intercept = float(v.mean() - slope * u.mean())
    residuals = v - intercept - slope * u
    reducible = np.exp(intercept + slope * u)
    variance = ((floor + reducible) / reducible) ** 2  # of each log, over that of ln y
    left = 1 - 1 / n - (u - u.mean()) ** 2 / spread
    sd = math.sqrt(float((residuals**2).sum() / (variance * left).sum()))
    alpha, a = -slope, math.exp(intercept)
    result: dict[str, Any] = {
        "objective": float((residuals**2).sum()),
        "residuals": tuple(residuals),
        "residual_sd": sd,
        "r": pearson(u, v),
    }
    if alpha <= 0:
        return LawFit(
            form="power", status="not-converged", reason=f"the value does not fall with size (exponent {alpha:.3g})", **result, **common
        )
    noise = t_factor(LEVEL, n - 2) * max(sd, common["noise_floor"])
    half = noise * math.sqrt(float((variance * (u - u.mean()) ** 2).sum())) / spread
    half_a = noise * math.sqrt(float((variance * (1 / n - u.mean() * (u - u.mean()) / spread) ** 2).sum()))
    intervals = {"alpha": (alpha - half, alpha + half), "a": (a * math.exp(-half_a), a * math.exp(half_a))}
    params = {"E": floor, "a": a, "alpha": alpha, "beta": paper_beta(a, alpha, UNITS.get(common["variable"], 1.0))}
    audit = {"method": "least squares on logs, closed form", "gradient_norm": float(np.hypot(residuals.sum(), (residuals * u).sum())),
             "active_bounds": [], "starts": 1, "agree": 1}  # fmt: skip
    return LawFit(form="power", status="converged", params=params, intervals=intervals, audit=audit, **result, **common)


def profile(alphas: Array, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Variable projection: for each exponent the best E >= 0 and b >= 0 of y = E + b z, z = (x / gmean)^-alpha, in closed form.

    alphas (..., K) broadcasts against y (..., 1, n). Minimises sum ((E + b z) / y - 1)^2, relative errors.
    Returns E, b and the objective, each of the shape of alphas.
    """
    z = np.exp(-alphas[..., None] * (np.log(x) - np.log(x).mean()))
    p, q = 1 / y, z / y
    pp, qq, pq, p1, q1 = (u.sum(-1) for u in (p * p, q * q, p * q, p, q))
    determinant = np.maximum(pp * qq - pq * pq, 1e-300)
    floor, b = (p1 * qq - q1 * pq) / determinant, (q1 * pp - p1 * pq) / determinant
    below, flat = floor < 0, b < 0
    floor, b = np.where(below, 0, floor), np.where(below, q1 / qq, b)
    floor, b = np.where(flat, p1 / pp, floor), np.where(flat, 0, b)
    return floor, b, ((floor[..., None] * p + b[..., None] * q - 1) ** 2).sum(-1)


def ridge(x: Array, y: Array, floors: Array, alphas: Array) -> Array:
    """The objective of `profile` on a grid of floors (F,) and exponents (P,), the best b >= 0 at each: (F, P)."""
    q = np.exp(-alphas[:, None] * (np.log(x) - np.log(x).mean())) / y
    left = 1 - floors[:, None] / y
    b = np.maximum(left @ q.T / (q * q).sum(1), 0)
    return np.asarray((left**2).sum(1)[:, None] - 2 * b * (left @ q.T) + b**2 * (q * q).sum(1))


class Ridge(NamedTuple):
    """The exponents that the points allow at each E, arrays of shape (E,): the best, and the ends of the joint regions of 50 % and 95 %,
    NaN where a region has none."""

    floors: Array
    best: Array
    excess: Array
    """at the best exponent: how much worse than the best fit of all, in variances of a run"""
    half: tuple[Array, Array]
    most: tuple[Array, Array]


def ridge_regions(fit: LawFit, floors: int = 600, alphas: int = 3000) -> Ridge:
    """Of a converged `power_floor`: where the objective is no further above its minimum than 2 F sd^2, F of the level with 2 and n - 3
    degrees of freedom."""
    from scipy.special import fdtri

    x, y = np.asarray(fit.x), np.asarray(fit.y)
    low, high = (min(max(end, ALPHA_BOUNDS[0]), ALPHA_BOUNDS[1]) for end in fit.intervals["alpha"])
    exponents = np.geomspace(max(low / 2, ALPHA_BOUNDS[0]), min(high * 2, ALPHA_BOUNDS[1]), alphas)
    e_low, e_high = fit.intervals["E"]
    margin = 0.4 * (e_high - e_low) + 1e-3 * e_high
    es = np.linspace(max(0.0, e_low - margin), min(e_high + margin, 0.9999 * float(y.min())), floors)
    excess = np.maximum(ridge(x, y, es, exponents) - fit.objective, 0) / fit.sd**2

    def ends(level: float) -> tuple[Array, Array]:
        inside = excess <= 2 * float(fdtri(2, len(x) - 3, level))
        some = inside.any(1)
        first, last = exponents[inside.argmax(1)], exponents[alphas - 1 - inside[:, ::-1].argmax(1)]
        return np.where(some, first, np.nan), np.where(some, last, np.nan)

    return Ridge(es, exponents[excess.argmin(1)], excess.min(1), ends(0.5), ends(LEVEL))


def profile_intervals(x: Array, y: Array, best: float, floor: float, log_alpha: float, sd: float) -> dict[str, tuple[float, float]]:
    """Of E and alpha: where the objective, the others at their best, is no further above its minimum than (t sd)^2, t Student's with n - 3
    degrees of freedom (profile likelihood with unknown noise). An end that the data do not bound is 0 or infinite."""
    limit = best + t_factor(LEVEL, len(x) - 3) ** 2 * sd**2
    low, high = map(math.log, ALPHA_BOUNDS)

    def at_alpha(log: float) -> float:
        return float(profile(np.array([math.exp(log)]), x, y)[2][0])

    ends = [math.exp(_end(at_alpha, log_alpha, bound, limit)) for bound in (low, high)]
    top = float(y.min()) * (1 - 1e-9)
    return {
        "E": (_end(lambda e: _best_at(x, y, e), floor, 0.0, limit), _end(lambda e: _best_at(x, y, e), floor, top, limit)),
        "alpha": (0.0 if ends[0] <= ALPHA_BOUNDS[0] * 1.001 else ends[0], math.inf if ends[1] >= ALPHA_BOUNDS[1] / 1.001 else ends[1]),
    }


def _best_at(x: Array, y: Array, floor: float) -> float:
    """The objective with this floor, exponent and b at their best: by a grid that is made finer five times."""
    low, high = map(math.log, ALPHA_BOUNDS)
    for _ in range(6):
        logs = np.linspace(low, high, 60)
        values = ridge(x, y, np.array([floor]), np.exp(logs))[0]
        place = int(values.argmin())
        low, high = logs[max(place - 1, 0)], logs[min(place + 1, 59)]
    return float(values.min())


def _end(value: Callable[[float], float], start: float, bound: float, limit: float) -> float:
    """Where `value` crosses `limit` on the way from `start` to `bound`: in steps that grow from a millionth of the way, then halved;
    `bound` where it does not."""
    way = bound - start
    inside, step = 0.0, 1e-6
    while value(start + step * way) <= limit:
        if step == 1:
            return bound
        inside, step = step, min(1.4 * step, 1.0)
    outside = step
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if value(start + middle * way) <= limit else (inside, middle)
    return start + inside * way


def _power_floor(x: Array, y: Array, seed: int, common: dict[str, Any]) -> LawFit:
    """Minimise the profile over alpha from every local minimum of a grid, then audit."""
    from scipy.optimize import minimize_scalar

    from var_scale.study.bootstrap import floor_draws

    def objective(log_alpha: float) -> float:
        return float(profile(np.array([math.exp(log_alpha)]), x, y)[2][0])

    grid = np.linspace(math.log(ALPHA_BOUNDS[0]), math.log(ALPHA_BOUNDS[1]), 400)
    values = profile(np.exp(grid), x, y)[2]
    padded = np.concatenate([[np.inf], values, [np.inf]])
    starts = np.flatnonzero((values <= padded[:-2]) & (values <= padded[2:]))
    ends = []
    for index in map(int, starts):
        low, high = grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)]
        found = minimize_scalar(objective, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
        ends.append((float(found.fun), float(found.x)))
    best, log_alpha = min(ends)
    alpha = math.exp(log_alpha)
    floors, bs, _ = profile(np.array([alpha]), x, y)
    floor, a = float(floors[0]), float(bs[0]) * math.exp(alpha * float(np.log(x).mean()))
    fitted = floor + a * x**-alpha
    step = 1e-5
    gradient = (objective(log_alpha + step) - objective(log_alpha - step)) / (2 * step)
    bounds = ["floor at 0"] if floor == 0 else []
    bounds += ["floor at the smallest value"] if floor >= 0.999 * y.min() else []
    bounds += ["alpha at its lower bound"] if alpha <= ALPHA_BOUNDS[0] * 1.02 else []
    bounds += ["alpha at its upper bound"] if alpha >= ALPHA_BOUNDS[1] / 1.02 else []
    audit = {
        "method": "variable projection, relative errors", "gradient_norm": abs(gradient), "active_bounds": bounds, "starts": len(ends),
        "agree": sum(value <= best * 1.001 + 1e-15 for value, _ in ends), "local_minima": [math.exp(place) for _, place in ends],
    }  # fmt: skip
    residuals = np.log(y / fitted)
    sd = math.sqrt(best / (len(x) - 3))
    result: dict[str, Any] = {"objective": best, "residuals": tuple(residuals), "residual_sd": sd, "audit": audit}
    if a <= 0 or any(bound != "floor at 0" for bound in bounds):
        reason = f"the floor is not identified by these points: {', '.join(bounds) or 'no decay with size'}"
        return LawFit(form="power_floor", status="not-converged", reason=reason, **result, **common)
    kink = (objective(log_alpha + step) - 2 * best + objective(log_alpha - step)) / step  # at E = 0 the two sides differ by this much
    if abs(gradient) > 1e-2 * (best + 1e-8) + abs(kink):
        reason = f"the gradient at the end is {abs(gradient):.2g} of objective {best:.2g}"
        return LawFit(form="power_floor", status="not-converged", reason=reason, **result, **common)
    draws = floor_draws(x, fitted, max(sd, common["noise_floor"]), seed)
    params = {"E": floor, "a": a, "alpha": alpha, "beta": paper_beta(a, alpha, UNITS.get(common["variable"], 1.0))}
    intervals = profile_intervals(x, y, best, floor, log_alpha, max(sd, common["noise_floor"]))
    sides = np.array([end if 0 < end < math.inf else alpha for end in intervals["alpha"]])
    scaled = profile(sides, x, y)[1] * np.exp(sides * float(np.log(x).mean()))  # along the ridge: a and alpha go together
    intervals["a"] = (float(scaled[0]) if intervals["alpha"][0] > 0 else 0.0,
                      float(scaled[1]) if intervals["alpha"][1] < math.inf else math.inf)  # fmt: skip
    r = pearson(np.log(x), np.log(y - floor)) if floor < y.min() else math.nan
    return LawFit(form="power_floor", status="converged", params=params, intervals=intervals, r=r,
                  draws=tuple(map(tuple, draws.tolist())), **result, **common)  # fmt: skip


def floor_strip(
    x: Sequence[float], y: Sequence[float], fractions: Sequence[float] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
) -> list[dict[str, float]]:
    """How exponent and correlation move with an ASSUMED floor E (spec/scaling.md 0.3): rows of E, alpha, r, residual_sd."""
    strip = []
    for fraction in fractions:
        fit = fit_law("power", x, y, floor=fraction * min(y))
        if fit.converged:
            strip.append({"E": fit.params["E"], "alpha": fit.params["alpha"], "r": fit.r, "residual_sd": fit.residual_sd})
    return strip


def pearson(u: Array, v: Array) -> float:
    """Pearson's correlation; NaN when one of the two does not vary."""
    du, dv = u - u.mean(), v - v.mean()
    scale = math.sqrt(float((du**2).sum() * (dv**2).sum()))
    return float((du * dv).sum()) / scale if scale > 0 else math.nan
