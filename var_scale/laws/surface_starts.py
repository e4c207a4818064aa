"""Starts for the fit of a surface: a map of all pairs of exponents by variable projection.

L = E + A N^-alpha + B D^-beta is linear in E, A and B, so at each of 4,624 pairs of exponents the
best three follow in closed form. Descents then start from the local minima of that map instead of
from a grid of guesses over five parameters, of which most end in poor local minima.
"""

from __future__ import annotations

import math

import numpy as np

from var_scale.laws.forms import Array
from var_scale.laws.surface_objective import Problem, log_data

EXPONENTS = np.geomspace(0.01, 2.5, 68)
"""Exponents of N and of D; all pairs are scanned."""
PASSES = (1.0, 4.0, 16.0, 64.0)
"""Values of r_star to start from."""
DESCENTS = 16
"""Most descents of a fit, per value of r_star half as many."""
FREE = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))
"""Which of E, A, B are not 0: with so few coefficients all cases of non-negative least squares."""


def starts(problem: Problem) -> list[Array]:
    """Places to descend from, as theta."""
    if problem.form == "tied":
        return [
            start[:4] for start in _places(problem.u, problem.w, problem.v, DESCENTS, tied=True)
        ]
    if problem.form == "chinchilla":
        return _places(problem.u, problem.w, problem.v, DESCENTS)
    found = []
    for r in PASSES:
        data = log_data(problem.d, problem.unique, r)[0] - problem.mw
        for start in _places(problem.u, data, problem.v, DESCENTS // 2):
            found.append(np.append(start, math.log(r)))
    return found


def _scan(u: Array, w: Array, loss: Array, weight: Array) -> tuple[Array, Array]:
    """Best E, A, B >= 0 of L = E + A e^(-alpha u) + B e^(-beta w) at all pairs of EXPONENTS.

    Weighted least squares of relative errors, from inner products alone, so that thousands of
    pairs take milliseconds.

    Returns:
        The coefficients (P, P, 3) and the objective (P, P).
    """
    count = len(EXPONENTS)
    root = np.sqrt(weight)
    one = root / loss
    sized, fed = (np.exp(-EXPONENTS[:, None] * x) * one for x in (u, w))
    gram, right = np.empty((count, count, 3, 3)), np.empty((count, count, 3))
    products = {
        (0, 0): one @ one,
        (0, 1): (sized @ one)[:, None],
        (0, 2): (fed @ one)[None],
        (1, 1): (sized**2).sum(1)[:, None],
        (1, 2): sized @ fed.T,
        (2, 2): (fed**2).sum(1)[None],
    }
    for (row, column), value in products.items():
        gram[..., row, column] = gram[..., column, row] = value
    for row, value in enumerate((one @ root, (sized @ root)[:, None], (fed @ root)[None])):
        right[..., row] = value
    best, objective = np.zeros_like(right), np.full(right.shape[:2], np.inf)
    total = float(weight.sum())
    for kept in FREE:
        # The smallest exponents make a term nearly constant; 1e-12 of the diagonal keeps its
        # system solvable without moving any other.
        tiny = 1e-12 * np.eye(len(kept)) * gram[..., kept, kept][..., None, :]
        part = gram[..., kept, :][..., kept] + tiny
        found = np.zeros_like(right)
        found[..., kept] = np.linalg.solve(part, right[..., kept][..., None])[..., 0]
        value = total - (found * right).sum(-1)
        better = (found >= 0).all(-1) & (value < objective - 1e-12)
        best[better], objective[better] = found[better], value[better]
    return best, objective


def _places(u: Array, w: Array, v: Array, count: int, tied: bool = False) -> list[Array]:
    """The local minima of the map and its best places besides, at most `count`, best first.

    With `tied` only places with equal exponents.

    The scan is made twice, the second time with little weight for what the first misses by far, so
    that a few diverged runs do not choose the place.
    """
    loss, weight = np.exp(v), np.ones_like(v)
    for _ in range(2):
        coefficients, objective = _scan(u, w, loss, weight)
        if tied:
            objective = np.where(np.eye(len(EXPONENTS), dtype=bool), objective, np.inf)
        i, j = map(int, np.unravel_index(objective.argmin(), objective.shape))
        terms = [np.ones_like(u), np.exp(-EXPONENTS[i] * u), np.exp(-EXPONENTS[j] * w)]
        fitted = coefficients[i, j] @ np.stack(terms)
        miss = np.abs(np.log(np.maximum(fitted, 1e-300)) - v)
        weight = np.minimum(1.0, 2 * np.median(miss) / np.maximum(miss, 1e-12)) ** 2
    padded = np.pad(objective, 1, constant_values=np.inf)
    size = len(EXPONENTS)
    around = [
        padded[1 + a : 1 + a + size, 1 + b : 1 + b + size]
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        if a or b
    ]
    minima = np.argwhere((objective <= np.min(around, axis=0)) & np.isfinite(objective))
    # Not all of the ranking: its first places are neighbours of each other.
    apart = 2 if tied else 20
    ranked = np.argsort(objective, axis=None)[: count // 2 * apart : apart]
    chosen = (*minima, *(np.unravel_index(k, objective.shape) for k in ranked))
    places = sorted({tuple(map(int, p)) for p in chosen}, key=lambda place: objective[place])
    small = 1e-6 * float(np.median(loss))  # a coefficient at 0 has no logarithm to start from
    found = []
    for i, j in places[:count]:
        e, a, b = np.log(np.maximum(coefficients[i, j], small))
        found.append(np.array([a, b, e, EXPONENTS[i], EXPONENTS[j]]))
    return found
