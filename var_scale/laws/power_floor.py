"""The power law with a fitted floor: variable projection, profile likelihood, bootstrap.

y = E + a x^-alpha is linear in E and a, so both follow in closed form at every exponent (variable
projection, Golub and Pereyra 1973). The search is over one number and sees every local minimum; a
descent over all three parameters at once creeps along the ridge where E and alpha trade off, and
ends where it started. The sum of squares is of relative errors, because the noise is a share of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from var_scale.laws.bootstrap import drawn_noise
from var_scale.laws.forms import LEVEL, Array, t_factor
from var_scale.laws.law import Interval, LawFit
from var_scale.laws.power import named, pearson
from var_scale.laws.repeats import Noise, Spread

ALPHA_BOUNDS = (0.003, 4.0)
"""Exponents that are searched; at the lower end the law is a logarithm, at the upper end a step."""
DRAWS = 1000
MINIMA = 8
"""Most local minima that are refined. Points have one to three; where they do not decay with size
the objective is flat, and rounding makes hundreds."""
COARSE, FINE = 80, 41
"""Exponents of both grids on which a bootstrap draw is refitted."""


def fit_power_floor(points: LawFit, seed: int) -> LawFit:
    """Minimise the profile over alpha from the local minima of a grid, then audit the end."""
    x, y, root = np.asarray(points.x), np.asarray(points.y), np.sqrt(points.given_weights())
    ends = _minima(x, y, root)
    best, log_alpha = min(ends)
    alpha = math.exp(log_alpha)
    floors, bs, _ = profile(np.array([alpha]), x, y, root)
    floor, a = float(floors[0]), float(bs[0]) * math.exp(alpha * float(np.log(x).mean()))
    fitted = floor + a * x**-alpha
    bounds = _active_bounds(floor, float(y.min()), alpha)
    step = 1e-5
    ahead, behind = (_at_log(x, y, log_alpha + s, root) for s in (step, -step))
    gradient = (ahead - behind) / (2 * step)
    audit = {
        "method": "variable projection, relative errors",
        "gradient_norm": abs(gradient),
        "active_bounds": bounds,
        "starts": len(ends),
        "agree": sum(value <= best * 1.001 + 1e-15 for value, _ in ends),
        "local_minima": [math.exp(place) for _, place in ends],
    }
    sd = math.sqrt(best / (len(x) - 3))
    noise = points.noise_of(sd, len(x) - 3)
    result: dict[str, Any] = {
        "objective": best,
        "residuals": tuple(np.log(y / fitted)),
        "residual_sd": sd,
        "noise": noise,
        "audit": audit,
    }
    # A floor of 0 is a result (the plain power law); every other bound means that the points leave
    # floor and exponent open.
    if a <= 0 or any(bound != "floor at 0" for bound in bounds):
        reason = ", ".join(bounds) or "no decay with size"
        return points.failed(
            "floor_not_identified",
            f"these points do not identify the floor: {reason}",
            **result,
        )
    # Where the floor reaches 0 the profile has a kink, at which a gradient is no sign of failure.
    kink = (ahead - 2 * best + behind) / step
    if abs(gradient) > 1e-2 * (best + 1e-8) + abs(kink):
        reason = f"the gradient at the end is {abs(gradient):.2g} at an objective of {best:.2g}"
        return points.failed("gradient", reason, **result)
    return points.solved(
        params=named(floor, a, alpha, points.variable),
        intervals=profile_intervals(x, y, best, (floor, a, log_alpha), noise.point, root),
        r=pearson(np.log(x), np.log(y - floor)) if floor < y.min() else math.nan,
        draw=partial(floor_draws, x, fitted, noise, seed, root=root),
        **result,
    )


def _at_log(x: Array, y: Array, log_alpha: float, root: Array | float) -> float:
    """The profile at one exponent."""
    return float(profile(np.array([math.exp(log_alpha)]), x, y, root)[2][0])


def _minima(x: Array, y: Array, root: Array | float) -> list[tuple[float, float]]:
    """(objective, ln alpha) of the local minima of a grid, refined between their neighbours."""
    from scipy.optimize import minimize_scalar

    grid = np.linspace(math.log(ALPHA_BOUNDS[0]), math.log(ALPHA_BOUNDS[1]), 400)
    values = profile(np.exp(grid), x, y, root)[2]
    padded = np.concatenate([[np.inf], values, [np.inf]])
    ends = []
    minima = np.flatnonzero((values <= padded[:-2]) & (values <= padded[2:]))
    for index in minima[np.argsort(values[minima], kind="stable")][:MINIMA]:
        found = minimize_scalar(
            lambda log_alpha: _at_log(x, y, log_alpha, root),
            bounds=(grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)]),
            method="bounded",
            options={"xatol": 1e-10},
        )
        ends.append((float(found.fun), float(found.x)))
    return ends


def _active_bounds(floor: float, least: float, alpha: float) -> list[str]:
    """Names of the bounds at which the fit ended."""
    reached = {
        "floor at 0": floor == 0,
        "floor at the smallest value": floor >= 0.999 * least,
        "alpha at its lower bound": alpha <= ALPHA_BOUNDS[0] * 1.02,
        "alpha at its upper bound": alpha >= ALPHA_BOUNDS[1] / 1.02,
    }
    return [name for name, active in reached.items() if active]


def profile(
    alphas: Array, x: Array, y: Array, root: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Best E >= 0 and b >= 0 of y = E + b z, z = (x / gmean(x))^-alpha, at each exponent.

    Minimises sum w ((E + b z) / y - 1)^2 in closed form. Dividing x by its geometric mean keeps z
    near 1, so that the normal equations are well conditioned for every exponent.

    Args:
        alphas: exponents (..., K), broadcast against y.
        x: sizes (n,).
        y: values (..., 1, n), or (n,).
        root: square roots of the weights w, (n,).

    Returns:
        E, b and the objective, each of the shape (..., K).
    """
    z = np.exp(-alphas[..., None] * (np.log(x) - np.log(x).mean()))
    p, q = root / y, root * z / y
    pp, qq, pq, p1, q1 = (u.sum(-1) for u in (p * p, q * q, p * q, p * root, q * root))
    determinant = np.maximum(pp * qq - pq * pq, 1e-300)
    floor, b = (p1 * qq - q1 * pq) / determinant, (q1 * pp - p1 * pq) / determinant
    # Where one coefficient is negative the constrained optimum has it at 0 and the other alone.
    below, flat = floor < 0, b < 0
    floor, b = np.where(below, 0, floor), np.where(below, q1 / qq, b)
    floor, b = np.where(flat, p1 / pp, floor), np.where(flat, 0, b)
    return floor, b, ((floor[..., None] * p + b[..., None] * q - root) ** 2).sum(-1)


def ridge(x: Array, y: Array, floors: Array, alphas: Array, root: Array | float = 1.0) -> Array:
    """The objective of `profile` at given floors (F,) and exponents (P,), b >= 0 best: (F, P)."""
    q = root * np.exp(-alphas[:, None] * (np.log(x) - np.log(x).mean())) / y
    left = root * (1 - floors[:, None] / y)
    qq, lq = (q * q).sum(1), left @ q.T
    b = np.maximum(lq / qq, 0)
    return np.asarray((left**2).sum(1)[:, None] - 2 * b * lq + b**2 * qq)


def profile_intervals(
    x: Array,
    y: Array,
    best: float,
    at: tuple[float, float, float],
    noise: Spread,
    root: Array | float = 1.0,
) -> dict[str, Interval]:
    """Profile likelihood intervals of E, alpha and a with unknown noise.

    A value is inside when the objective, with the other parameters at their best, is no further
    above its minimum than (t sd)^2; t is Student's with the degrees of freedom of sd. The usual
    interval from the curvature at the optimum is useless here: the ridge of E and alpha is bent.
    An end that the data do not bound is 0 or infinite; so is the upper end of E where any floor
    below the smallest value is inside.
    """
    floor, a, log_alpha = at
    limit = best + t_factor(LEVEL, noise.freedom) ** 2 * noise.sd**2
    low, high = (
        math.exp(_end(lambda log: _at_log(x, y, log, root), log_alpha, math.log(bound), limit))
        for bound in ALPHA_BOUNDS
    )
    # A floor at the smallest value leaves nothing that could decay.
    top = float(y.min()) * (1 - 1e-9)
    floors = (_end(lambda e: _best_at(x, y, e, root), floor, bound, limit) for bound in (0.0, top))
    alphas = (
        0.0 if low <= ALPHA_BOUNDS[0] * 1.001 else low,
        math.inf if high >= ALPHA_BOUNDS[1] / 1.001 else high,
    )
    low_e, high_e = floors
    return {
        "E": (low_e, high_e if high_e < top else math.inf),
        "alpha": alphas,
        "a": _interval_of_a(x, y, a, limit, alphas, root),
    }


def _interval_of_a(
    x: Array, y: Array, a: float, limit: float, alphas: Interval, root: Array | float
) -> Interval:
    """Smallest and largest a whose objective is within `limit`, over all exponents in `alphas`;
    with points exactly on a law only the estimate `a`.

    At one exponent the objective with E at its best is convex in b: a parabola, and beyond the b at
    which E reaches 0 another one. Both ends are therefore roots of parabolas. Along the ridge a is
    not monotone in alpha, so the ends need not lie where alpha ends.
    """
    grid = np.geomspace(max(alphas[0], ALPHA_BOUNDS[0]), min(alphas[1], ALPHA_BOUNDS[1]), 4000)
    p, one = root / y, root * np.ones_like(y)
    q = root * np.exp(-grid[:, None] * (np.log(x) - np.log(x).mean())) / y
    pp, p1, total = float(p @ p), float(p @ one), float(one @ one)
    qq, pq, q1 = (q * q).sum(1), q @ p, q @ one
    ends = []
    for curve, slope, least in (
        (qq - pq**2 / pp, q1 - pq * p1 / pp, total - p1**2 / pp),  # E at its best
        (qq, q1, total),  # E = 0
    ):
        middle = slope / curve
        room = np.maximum(limit - (least - slope * middle), 0)  # 0 where the parabola stays above
        half = np.sqrt(room / curve)
        ends.append((middle - half, middle + half, least - slope * middle <= limit))
    (low, high, inside), (low_0, high_0, inside_0) = ends
    zero = p1 / pq  # the b from which on E = 0
    scale = np.exp(grid * float(np.log(x).mean()))
    found = [
        a,
        *(low * scale)[inside & (low <= zero)],
        *(high * scale)[inside & (high <= zero)],
        *(low_0 * scale)[inside_0 & (low_0 >= zero)],
        *(high_0 * scale)[inside_0 & (high_0 >= zero)],
    ]
    return (
        max(float(min(found)), 0.0) if alphas[0] > 0 else 0.0,
        float(max(found)) if alphas[1] < math.inf else math.inf,
    )


def _best_at(x: Array, y: Array, floor: float, root: Array | float) -> float:
    """The objective at one floor, with exponent and b at their best: a grid refined three times,
    to 1e-5 of ln alpha."""
    low, high = map(math.log, ALPHA_BOUNDS)
    for _ in range(4):
        logs = np.linspace(low, high, 60)
        values = ridge(x, y, np.array([floor]), np.exp(logs), root)[0]
        place = int(values.argmin())
        low, high = logs[max(place - 1, 0)], logs[min(place + 1, 59)]
    return float(values.min())


def _end(value: Callable[[float], float], start: float, bound: float, limit: float) -> float:
    """Where `value` crosses `limit` on the way from `start` to `bound`; `bound` if it does not.

    Steps grow from a millionth of the way, because an interval can be that narrow.
    """
    from scipy.optimize import brentq

    way = bound - start
    inside, step = 0.0, 1e-6
    while value(start + step * way) <= limit:
        if step == 1:
            return bound
        inside, step = step, min(2 * step, 1.0)

    def excess(place: float) -> float:
        return value(start + place * way) - limit

    # At the estimate itself the objective may exceed its limit by rounding.
    if excess(inside) >= 0:
        return start + inside * way
    return start + float(brentq(excess, inside, step, xtol=1e-9 * step)) * way


def floor_draws(
    x: Array,
    fitted: Array,
    noise: Noise,
    seed: int = 0,
    draws: int = DRAWS,
    root: Array | float = 1.0,
) -> Array:
    """Parametric bootstrap: refits of the law to simulated points.

    Each draw first takes its own noise (see `drawn_noise`), then y = fitted exp(noise z). All draws
    are refitted at once by the profile over a coarse and a fine grid of ln alpha, in parts that
    stay in the cache.

    Returns:
        Rows of (E, a, alpha, noise of a new run), shape (draws, 4).
    """
    rng = np.random.default_rng(seed)
    n = len(x)
    sds = drawn_noise(rng, *noise.point, draws)
    runs = sds * noise.run.sd / noise.point.sd
    y = fitted * np.exp(sds[:, None] * rng.standard_normal((draws, n)) / root)
    out = np.empty((draws, 4))
    coarse = np.linspace(np.log(ALPHA_BOUNDS[0]), np.log(ALPHA_BOUNDS[1]), COARSE)
    step = coarse[1] - coarse[0]
    for part in np.array_split(np.arange(draws), max(1, draws * n // 4000)):
        values = profile(np.exp(coarse)[None, :], x, y[part, None, :], root)[2]
        best = coarse[values.argmin(1)]
        fine = best[:, None] + np.linspace(-step, step, FINE)
        floors, bs, objective = profile(np.exp(fine), x, y[part, None, :], root)
        pick, row = objective.argmin(1), np.arange(len(part))
        alpha = np.exp(fine[row, pick])
        out[part, 0], out[part, 2], out[part, 3] = floors[row, pick], alpha, runs[part]
        out[part, 1] = bs[row, pick] * np.exp(alpha * np.log(x).mean())
    return out
