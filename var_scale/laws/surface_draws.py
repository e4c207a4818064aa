"""Intervals of a surface: a bootstrap of its runs.

Where every run has a size of its own, runs are drawn with replacement. Runs of one size may share
an error of its recipe, which such draws take for information about the law: with a common error of
0.5 % and a noise of 0.2 %, 95 % intervals of alpha hold the truth in 61 % of studies of five sizes
and five lengths. Sizes drawn with replacement are too few to be drawn. So for repeated sizes the
bootstrap is parametric: both variances are drawn from what the residuals allow (restricted
likelihood), new runs are simulated with them, and the surface is refitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.bootstrap import drawn_noise, resamples, span
from var_scale.laws.forms import NAMES, Array, Form, effective_data, law_value
from var_scale.laws.law import Interval
from var_scale.laws.surface_objective import BOUNDS, Problem, log_data
from var_scale.laws.surface_refit import refit

Scheme = Literal["runs", "sizes"]
NO_COMMON = 0.5
"""Probability, before the residuals are seen, that the runs of a size share no error."""
COMMON = 2.0
"""Otherwise half of the common errors exceed the noise of a run by this factor (half-Cauchy)."""
TELLING_SIZES = 5
"""Fewest sizes whose residuals show how large a common error is. The law itself takes three
parameters from the sizes; with fewer than two more, the prior above decides how large it is."""
GRID = 200
"""Ratios of both standard deviations that are weighed."""


def surface_draws(
    problem: Problem, theta: Array, residuals: Array, sd: float, draws: int, seed: int
) -> tuple[Array, Scheme]:
    """Refits from the optimum `theta`: rows of NAMES and the noise per run, (draws, ...), and
    whether runs were resampled or sizes given common errors."""
    sizes, size = np.unique(problem.n, return_inverse=True)
    count, rng = len(problem.v), np.random.default_rng(seed)
    if count < 2 * len(sizes):
        scheme: Scheme = "runs"
        noise = drawn_noise(rng, sd, count - len(theta), draws)
        times = np.stack([np.bincount(k, minlength=count) for k in resamples(count, seed, draws)])
        ends = refit(problem, theta, np.tile(problem.v, (draws, 1)), times * problem.weights)
    else:
        scheme = "sizes"
        params = problem.natural(theta)
        jacobian = surface_jacobian(problem, params)
        noises, ratios = drawn_errors(residuals, jacobian, size, problem.weights, rng, draws)
        logs = np.log(law_value(problem.form, params, problem.n, problem.d, problem.unique))
        common = ratios[:, None] * rng.standard_normal((draws, len(sizes)))[:, size]
        own = rng.standard_normal((draws, count)) / np.sqrt(problem.weights)
        v = logs + noises[:, None] * (common + own)
        ends = refit(problem, theta, v, np.tile(problem.weights, (draws, 1)))
        # A new run is one of a new size, with a recipe of its own.
        noise = noises * np.sqrt(1 + ratios**2)
    natural = [list(problem.natural(end).values()) for end in ends]
    return np.column_stack([natural, noise]), scheme


def sizes_tell(n: Sequence[float]) -> bool:
    """Whether runs of the sizes `n` show how large an error is that runs of a size share."""
    return len(set(n)) >= TELLING_SIZES


def drawn_errors(
    residuals: Array,
    jacobian: Array,
    size: NDArray[np.intp],
    weights: Array,
    rng: np.random.Generator,
    draws: int,
) -> tuple[Array, Array]:
    """Standard deviations of the noise per run, and of the error that the runs of a size share over
    it: both (draws,).

    From their restricted likelihood (Patterson and Thompson 1971), which only uses the part of the
    residuals that the law cannot fit, with the prior NO_COMMON and COMMON of the ratio.

    Args:
        residuals: of ln L, (n,).
        jacobian: derivatives of ln L by the parameters, (n, parameters).
        size: number of each run's size, (n,).
        weights: inverse variances of the noise, (n,).
    """
    root = np.sqrt(weights)
    basis = np.linalg.qr(root[:, None] * jacobian, mode="complete")[0][:, jacobian.shape[1] :]
    members = root[:, None] * (size[:, None] == np.unique(size)[None, :])
    shared = basis.T @ members
    values, vectors = np.linalg.eigh(shared @ shared.T)
    squares = (vectors.T @ basis.T @ (root * residuals)) ** 2
    quantiles = (np.arange(GRID) + 0.5) / GRID
    ratios = np.concatenate([[0.0], COMMON * np.tan(quantiles * math.pi / 2)])
    prior = np.concatenate([[NO_COMMON], np.full(GRID, (1 - NO_COMMON) / GRID)])
    variances = 1 + ratios[:, None] ** 2 * np.maximum(values, 0)
    total = np.maximum((squares / variances).sum(1), 1e-300)
    freedom = len(squares)
    log_likelihood = -0.5 * np.log(variances).sum(1) - 0.5 * freedom * np.log(total)
    posterior = prior * np.exp(log_likelihood - log_likelihood.max())
    drawn = rng.choice(len(ratios), draws, p=posterior / posterior.sum())
    return np.sqrt(total[drawn] / rng.chisquare(freedom, draws)), ratios[drawn]


def surface_jacobian(problem: Problem, params: dict[str, float]) -> Array:
    """Derivatives of ln L by ln E (unless E = 0), ln A, ln B, alpha, beta and ln r_star, as far as
    the form has them, with ln N and ln D about their means: (n, parameters)."""
    n, d, unique = problem.n, problem.d, problem.unique
    total = law_value(problem.form, params, n, d, unique)
    repeated, beta = problem.form == "repeated", params.get("beta", params["alpha"])
    data = effective_data(d, unique, params["r_star"]) if repeated else d
    sized = params["A"] * n ** -params["alpha"] / total
    fed = params["B"] * data**-beta / total
    by_alpha = -sized * (np.log(n) - np.log(n).mean())
    by_beta = -fed * (np.log(data) - np.log(data).mean())
    columns = [params["E"] / total] if params["E"] > 0 else []
    columns += [sized, fed]
    columns += [by_alpha + by_beta] if problem.form == "tied" else [by_alpha, by_beta]
    if repeated:
        columns.append(-beta * fed * log_data(d, unique, params["r_star"])[1])
    return np.stack(columns, axis=1)


def intervals_of(
    form: Form, draws: Array, params: dict[str, float], least: float
) -> dict[str, Interval]:
    """95 % intervals from the draws. `least` is the smallest loss.

    Ends at which a search bound stopped the draws are open: 0 or infinite, and with an exponent its
    coefficient.
    """
    columns = dict(zip(NAMES[form], draws.T, strict=False))
    if "beta" in columns:
        columns["split"] = columns["beta"] / (columns["alpha"] + columns["beta"])
    found = {name: span(sample, params[name]) for name, sample in columns.items()}
    factors = {"alpha": ("A",), "beta": ("B",)} if "beta" in found else {"alpha": ("A", "B")}
    for exponent, names in factors.items():
        low, high = found[exponent]
        if high > 0.98 * BOUNDS[exponent][1]:
            high = math.inf
            found |= {name: (found[name][0], math.inf) for name in names}
        if low < 1e-3:
            low = 0.0
            found |= {name: (0.0, found[name][1]) for name in names}
        found[exponent] = (low, high)
    if found["E"][0] < 1e-3 * least:
        found["E"] = (0.0, found["E"][1])
    if "r_star" in found and math.log(found["r_star"][1]) > 0.98 * BOUNDS["r_star"][1]:
        found["r_star"] = (found["r_star"][0], math.inf)
    return found
