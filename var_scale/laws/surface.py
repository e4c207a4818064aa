"""The laws of parameters and data: `chinchilla`, `tied` with one exponent for both, and for data
seen several times `repeated`.

Objective: unless another one is chosen, the sum of Huber(1e-3) of ln L - ln fitted (Hoffmann et al.
2022, arXiv:2203.15556, approach 3). On Epoch's table of the Chinchilla runs (Besiroglu et al. 2024,
arXiv:2404.10102) this search ends below the objective of their published fit. Intervals are a
bootstrap (`laws/surface_draws.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from var_scale.laws.forms import PARAMETERS, Array, Form, law_value
from var_scale.laws.law import LawFit
from var_scale.laws.surface_draws import intervals_of, surface_draws, surface_jacobian
from var_scale.laws.surface_objective import BOUNDS, Objective, Problem, unit_of
from var_scale.laws.surface_refit import refit
from var_scale.laws.surface_starts import EXPONENTS, PASSES, starts

MAX_CONDITION = 2000.0
"""Largest condition number of the Jacobian of ln L with columns of length 1. Designs that determine
the law have 20 to 130, those that do not have 2e4 and more."""
LEAST_RUNS = 9
"""Fewest runs of a surface, and four more than it has parameters: intervals of chinchilla from six
or seven runs hold the truth in only 47 to 91 % of simulated studies."""
DEFAULT = Objective()
Problems = tuple[str, str] | None
"""Code and reason why there is no law."""


def fit_surface(
    n: Sequence[float] | Array,
    d: Sequence[float] | Array,
    loss: Sequence[float] | Array,
    unique: Sequence[float] | Array | None = None,
    *,
    form: Form | None = None,
    weights: Sequence[float] | Array | None = None,
    minimise: Objective = DEFAULT,
    rows: Sequence[str] = (),
    excluded: Sequence[tuple[str, str, str]] = (),
    draws: int = 0,
    seed: int = 0,
    metric: str = "loss_avg",
) -> LawFit:
    """Fit `chinchilla`, with `unique` the law `repeated`, or the `form` tied.

    Args:
        n: parameters of each run, (runs,).
        d: tokens, repeats counted.
        loss: the metric, above 0.
        unique: different tokens among d.
        weights: how much the miss of each run counts; the variance of its noise is taken to be
            inverse to it.
        minimise: the objective.
        rows: names of the runs.
        excluded: runs left out before, kept with the result.
        draws: bootstrap draws; without any the result has no intervals, and one run more than
            the form has parameters is enough.
        seed: seed of the bootstrap.

    Returns:
        A LawFit; runs that do not determine the law have status not-converged, a code and a reason.
        Its parameter `split` is beta / (alpha + beta), the exponent a of N ~ C^a in
        compute-optimal training without repetition (1/2 for tied, which does not list it).
    """
    form = form or ("chinchilla" if unique is None else "repeated")
    ns, ds, losses = (np.asarray(values, dtype=float) for values in (n, d, loss))
    us = np.full_like(ds, np.inf) if unique is None else np.asarray(unique, dtype=float)
    ws = np.ones_like(losses) if weights is None else np.asarray(weights, dtype=float)
    points = LawFit(
        form,
        metric,
        "N,D" if unique is None else "N,D,U",
        excluded=tuple(excluded),
        rows=tuple(rows) or tuple(map(str, range(len(losses)))),
        x=tuple(ns.tolist()),
        y=tuple(losses.tolist()),
        d=tuple(ds.tolist()),
        unique=() if unique is None else tuple(us.tolist()),
        row_weights=() if weights is None else tuple((ws / ws.mean()).tolist()),
    )
    need = max(LEAST_RUNS, PARAMETERS[form] + 4) if draws else PARAMETERS[form] + 1
    if unfit := _unfit(form, ns, ds, losses, us, need):
        return points.failed(*unfit)
    problem = Problem.of(form, ns, ds, losses, us, ws / ws.mean(), minimise)
    ends = _without_floor(problem, _search(problem))
    best, theta = ends[0]
    params = problem.natural(theta)
    residuals = np.log(losses / law_value(form, params, ns, ds, us))
    square = float((problem.weights * residuals**2).sum())
    sd = math.sqrt(square / (len(losses) - PARAMETERS[form]))
    unit = unit_of(minimise, problem.v)
    points = replace(points, objective=best * unit**2, residuals=tuple(residuals), residual_sd=sd)
    failure, audit = _audit(problem, params, ends)
    points = replace(points, audit=audit)
    if failure:
        return points.failed(*failure)
    shown = dict(params)
    if form != "tied":
        shown["split"] = params["beta"] / (params["alpha"] + params["beta"])
    if not draws:
        return points.solved(params=shown)
    made, audit["scheme"] = surface_draws(problem, theta, residuals, sd, draws, seed)
    return points.solved(
        params=shown,
        intervals=intervals_of(form, made, shown, float(losses.min())),
        draw=partial(np.asarray, made),
    )


Ends = list[tuple[float, Array]]
"""Objectives and places at which descents ended, best first."""


def _search(problem: Problem) -> Ends:
    """The ends of a search from all starts, of which the best is descended to once more."""
    places = np.stack(starts(problem))
    tables = (len(places), 1)
    found = refit(problem, places, np.tile(problem.v, tables), np.tile(problem.weights, tables))
    ends = sorted(((problem.objective(end)[0], end) for end in found), key=lambda end: end[0])
    return [problem.descend(ends[0][1]), *ends[1:]]


def _without_floor(problem: Problem, ends: Ends) -> Ends:
    """The ends, with E = 0 first where that fits as well: on the way to 0 the gradient by ln E
    vanishes, so a descent stops short of it."""
    best, theta = ends[0]
    least = float(np.exp(problem.v.min()))
    if theta[2] > math.log(1e-2 * least):
        return ends
    start = theta.copy()
    start[2] = BOUNDS["E"][0]
    value, place = problem.descend(start)
    if value > best + 1e-6 * (1 + best):
        return ends
    return [(value, place), *ends]


def _unfit(form: Form, n: Array, d: Array, loss: Array, unique: Array, need: int) -> Problems:
    """Code and reason why these rows cannot determine the law; None when they can."""
    if not (len(n) == len(d) == len(loss) == len(unique)):
        counts = (
            f"{len(n)} sizes, {len(d)} token counts, {len(loss)} losses, {len(unique)} counts of "
            "different tokens"
        )
        return "lengths_differ", f"{counts}; give as many of each"
    finite = all(np.isfinite(values).all() and (values > 0).all() for values in (n, d, loss))
    if not finite or not (unique > 0).all():
        return "not_positive", "a size, token count or loss is not a positive finite number"
    sizes, lengths = len(set(n.tolist())), len(set(d.tolist()))
    if len(n) < need or sizes < 3 or lengths < 3:
        counts = f"{len(n)} runs, {sizes} sizes, {lengths} token counts"
        return "too_few", f"{counts}; at least {need} runs with 3 of each are needed"
    # A ladder with a fixed number of tokens per parameter is such a case: D a power of N, but for a
    # hundredth of its variance.
    if float(np.corrcoef(np.log(n), np.log(d))[0, 1]) ** 2 > 0.99:
        return (
            "sizes_follow_tokens",
            "tokens are a power of the size, so nothing separates their parts of the loss; train "
            "sizes for several lengths",
        )
    if form == "repeated" and len(set(d[d > 1.01 * unique].tolist())) < 2:
        return "no_repetition", "fewer than two token counts repeat their data; use chinchilla"
    return None


def _audit(
    problem: Problem, params: dict[str, float], ends: Ends
) -> tuple[Problems, dict[str, object]]:
    """Why the end of the search is no result (None if it is one), and what was checked."""
    best, theta = ends[0]
    names = ("A", "B", "E", "alpha", "beta", "r_star")[: len(theta)]
    gradient = float(np.abs(problem.objective(theta)[1]).max())
    bounds = [
        name
        for name, value in zip(names, theta, strict=True)
        if min(value - BOUNDS[name][0], BOUNDS[name][1] - value) < 1e-6
    ]
    agree = sum(value <= best * (1 + 1e-4) + 1e-12 for value, _ in ends)
    audit: dict[str, object] = {
        "method": "variable projection over the exponents, reweighted least squares, L-BFGS-B",
        "minimise": problem.minimise.name,
        "delta": problem.minimise.delta if problem.minimise.name != "mse" else None,
        "gradient_norm": gradient,
        "active_bounds": bounds,
        "starts": len(EXPONENTS) ** (1 if problem.form == "tied" else 2)
        * (len(PASSES) if problem.form == "repeated" else 1),
        "descents": len(ends),
        "agree": agree,
    }
    if "r_star" in bounds and theta[5] > 0:
        return (
            "repetition_free",
            "r_star is at its upper bound: these rows show no loss through repetition; use "
            "chinchilla, or add runs of one pass",
        ), audit
    # E = 0 is a result, the law without a floor; every other bound leaves a parameter open.
    if any(name != "E" or theta[2] > 0 for name in bounds):
        return ("at_bound", f"at a bound: {', '.join(bounds)}"), audit
    if gradient > 1e-2 * (1 + best):
        return ("gradient", f"the gradient at the end is {gradient:.2g}"), audit
    audit["condition"] = condition = _condition(problem, params)
    if condition > MAX_CONDITION:
        return ("not_determined", _undetermined(problem)), audit
    if agree < 2:
        reason = f"only one of {len(ends)} descents reached the best objective"
        return ("starts_disagree", reason), audit
    return None, audit


def _condition(problem: Problem, params: dict[str, float]) -> float:
    """Condition number of the derivatives of ln L by the parameters, columns of length 1: how far
    the rows are from separating the parameters, whatever the noise. A small residual alone does not
    show it. E is among them also where it is 0: rows that allow any E do not determine it."""
    matrix = surface_jacobian(problem, params)
    if params["E"] == 0:
        by_floor = 1 / law_value(problem.form, params, problem.n, problem.d, problem.unique)
        matrix = np.column_stack([by_floor, matrix])
    lengths = np.linalg.norm(matrix, axis=0)
    if not (lengths > 0).all():
        return math.inf
    values = np.linalg.svd(matrix / lengths, compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def _undetermined(problem: Problem) -> str:
    """Why the parameters cannot be separated, as far as the design shows it."""
    text = "these rows do not determine the law, because other parameters fit them as well"
    if problem.form != "repeated":
        return f"{text}: add sizes or lengths further apart"
    passes = sorted({round(float(p), 3) for p in problem.d / problem.unique})
    return (
        f"{text}: there are {len(passes)} lengths of {passes[0]:g} to {passes[-1]:g} passes; add "
        "lengths, among them one of at most one pass"
    )
