"""Many searches for the optimum of a surface at once.

A fit searches from several starts, and a bootstrap refits the law to a few hundred tables. One
search for all of them together replaces hundreds of single ones: iteratively reweighted least
squares (Holland and Welsch 1977) with Marquardt's damping. It is about a hundred times as fast.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.forms import Array
from var_scale.laws.surface_objective import BOUNDS, Problem, log_data

ITERATIONS = 1000
"""Most iterations. With most misses beyond Huber's threshold the weights converge slowly. Tables
that are not finished then descend one by one."""
SETTLED = 1e-11
"""A table is finished once an iteration gains less than this share of its objective."""
LEAST_DAMPING = 1e-9
STALLED = 1e8
"""Damping at which a table is given up: no shorter step gains anything."""


def refit(problem: Problem, theta: Array, v: Array, weights: Array) -> Array:
    """The optima of tables that share the runs of `problem`.

    Args:
        theta: the start of all tables, (parameters,), or of each, (tables, parameters).
        v: ln L of every table, (tables, n).
        weights: weight of every run in every table, (tables, n).

    Returns:
        theta of every table, (tables, parameters).
    """
    low, high = np.array(list(BOUNDS.values())[: theta.shape[-1]]).T
    found = np.clip(theta, low, high) * np.ones((len(v), 1))
    damping, open_ = np.full(len(v), 1e-3), np.arange(len(v))
    for _ in range(ITERATIONS):
        here, targets, w = found[open_], v[open_], weights[open_]
        misses, slopes = _misses(problem, here, targets)
        pull = w * _huber_weights(problem, misses)
        gradient = np.einsum("kn,knp->kp", pull * misses, slopes)
        normal = np.einsum("kn,knp,knq->kpq", pull, slopes, slopes)
        # A parameter at its bound stays there while the objective falls towards the outside.
        held = ((here <= low) & (gradient > 0)) | ((here >= high) & (gradient < 0))
        step = _damped_step(normal, np.where(held, 0.0, gradient), held, damping[open_])
        place = np.clip(here - step, low, high)
        before = _objective(problem, misses, w)
        after = _objective(problem, _misses(problem, place, targets)[0], w)
        better = after < before
        found[open_[better]] = place[better]
        # A short step gains little, so a table has only settled with a small damping.
        settled = better & (before - after <= SETTLED * before) & (damping[open_] < 1e-2)
        damping[open_] = np.maximum(damping[open_] * np.where(better, 0.2, 5.0), LEAST_DAMPING)
        open_ = open_[~settled & (damping[open_] < STALLED)]
        if not len(open_):
            break
    for k in open_:
        found[k] = problem._replace(v=v[k], weights=weights[k]).descend(found[k])[1]
    return found


def _misses(problem: Problem, theta: Array, v: Array) -> tuple[Array, Array]:
    """What the objective sums, (tables, n), and its derivatives, (tables, n, parameters)."""
    a, b, e, alpha = (theta[:, [k]] for k in range(4))
    beta = alpha if problem.form == "tied" else theta[:, [4]]
    logs, by_r = problem.w, None
    if problem.form == "repeated":
        logs, by_r = log_data(problem.d, problem.unique, np.exp(theta[:, [5]]))
        logs = logs - problem.mw
    sized, fed = a - alpha * problem.u, b - beta * logs
    fitted = np.logaddexp(np.logaddexp(sized, fed), e)
    part_a, part_b, part_e = (np.exp(part - fitted) for part in (sized, fed, e + 0 * fitted))
    by_alpha, by_beta = -part_a * problem.u, -part_b * logs
    columns = [part_a, part_b, part_e]
    columns += [by_alpha + by_beta] if problem.form == "tied" else [by_alpha, by_beta]
    if by_r is not None:
        columns.append(-beta * part_b * by_r)
    slopes = np.stack(columns, axis=-1)
    if problem.minimise.name == "huber_log":
        return fitted - v, slopes
    level = np.exp(fitted)
    return level - np.exp(v), slopes * level[..., None]


def _huber_weights(problem: Problem, misses: Array) -> Array:
    """Weights with which least squares has the gradient of the objective."""
    return np.asarray(np.minimum(1.0, _delta(problem) / np.maximum(np.abs(misses), 1e-300)))


def _objective(problem: Problem, misses: Array, weights: Array) -> Array:
    """The objective of every table but for its unit, (tables,)."""
    size = np.abs(misses)
    inner = np.minimum(size, _delta(problem))
    with np.errstate(invalid="ignore", over="ignore"):  # a step into overflow is not better
        return np.asarray((weights * inner * (size - 0.5 * inner)).sum(1))


def _delta(problem: Problem) -> float:
    return math.inf if problem.minimise.name == "mse" else problem.minimise.delta


def _damped_step(normal: Array, gradient: Array, held: NDArray[np.bool_], damping: Array) -> Array:
    """Solve (normal + damping diag(normal)) step = gradient over the parameters that are not held:
    (tables, parameters)."""
    free = ~held
    normal = normal * (free[:, :, None] & free[:, None, :])
    diagonal = np.einsum("kpp->kp", normal)
    # A term of the law that has vanished has no curvature; its parameter then does not move.
    least = 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
    lifted = np.where(free, damping[:, None] * np.maximum(diagonal, least) + least, 1.0)
    system = normal + lifted[:, :, None] * np.eye(normal.shape[1])
    return np.asarray(np.linalg.solve(system, gradient[..., None])[..., 0])
