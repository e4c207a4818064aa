"""What to train with a given compute: the size and the data at which the surface L(N, D) is lowest.

FLOPs per token are those of the study's own runs, interpolated in ln N: exact counts, not 6 N. With
the form `repeated` the data are the study's, seen repeatedly; with `chinchilla` every token counts
as new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from var_scale.laws.bootstrap import span
from var_scale.laws.forms import NAMES, SURFACES, Form, law_value
from var_scale.laws.law import Interval, LawFit
from var_scale.laws.surface import fit_surface
from var_scale.records.record import RunRecord

DRAWS = 1000
REACH = 8.0
"""Sizes are searched beyond the study's smallest and largest by this factor."""


@dataclass(frozen=True)
class Optimum:
    """The best run of a compute budget, with 95 % intervals from the draws of the surface."""

    flops: float
    n: float
    n_interval: Interval
    depth: float
    depth_interval: Interval
    tokens: float
    tokens_interval: Interval
    epochs: float
    """Passes over the study's training set; NaN where its size is unknown."""
    loss: float
    loss_interval: Interval
    """Of the law at that place, without the noise of a run."""
    halved: float
    """Loss (nats) of half the best size, trained longer with the same compute, above the best."""
    doubled: float
    """The same for twice the best size."""
    beyond: bool
    """Whether it is extrapolated: more compute than any run had."""


def fit_surfaces(
    records: Sequence[RunRecord], metric: str = "loss_avg", seed: int = 0
) -> dict[str, LawFit]:
    """Surfaces of final values by form, `repeated` only where all runs know their data.

    Without enough sizes and token counts they carry the reason.
    """
    runs = [run for run in records if 0 < run.metric(metric) < math.inf]
    forms: list[Form] = ["chinchilla"]
    if all(run.unique_tokens for run in runs):
        forms.append("repeated")
    return {form: surface_of(runs, metric, form, DRAWS, seed) for form in forms}


def surface_of(
    runs: Sequence[RunRecord], metric: str, form: Form, draws: int, seed: int = 0
) -> LawFit:
    """The surface of a metric over parameters and tokens of these runs.

    Args:
        form: chinchilla or repeated.
        draws: bootstrap draws.
        seed: of the bootstrap.
    """
    return fit_surface(
        [run.n for run in runs],
        [run.tokens for run in runs],
        [run.metric(metric) for run in runs],
        [run.unique_tokens for run in runs] if form == "repeated" else None,
        rows=[run.name for run in runs],
        draws=draws,
        seed=seed,
        metric=metric,
    )


def best_surface(fits: dict[str, LawFit]) -> LawFit | None:
    """The converged surface with the smaller AICc; chinchilla where AICc decides nothing."""

    def rank(fit: LawFit) -> tuple[float, int]:
        return fit.aicc if math.isfinite(fit.aicc) else math.inf, SURFACES.index(fit.form)

    return min((fit for fit in fits.values() if fit.converged), key=rank, default=None)


def optimum(surface: LawFit, records: Sequence[RunRecord], flops: float) -> Optimum:
    """The best size for a budget of `flops` training FLOPs.

    Args:
        surface: a converged surface with draws.
        records: the runs to which it was fitted.
    """
    sizes = {run.n: run for run in sorted(records, key=lambda run: run.n)}
    known = np.log(np.array(list(sizes), dtype=float))
    grid = np.linspace(known[0] - math.log(REACH), known[-1] + math.log(REACH), 2000)
    outside = np.clip(grid - known[-1], 0, None) + np.clip(grid - known[0], None, 0)
    # Beyond the study FLOPs per token grow in proportion to N, and the depth as its cube root.
    costs = [math.log(run.flops_exact / run.tokens) for run in sizes.values()]
    n, d = np.exp(grid), flops / np.exp(np.interp(grid, known, costs) + outside)
    depths = np.interp(grid, known, [math.log(run.depth) for run in sizes.values()])
    depths = np.exp(depths + outside / 3)
    unique = {run.unique_tokens for run in records}
    places = [n, d] + ([np.full_like(d, max(unique))] if surface.form == "repeated" else [])
    draws = surface.draws
    columns = {name: draws[:, k, None] for k, name in enumerate(NAMES[surface.form])}
    drawn = law_value(surface.form, columns, *(place[None, :] for place in places))
    curve = law_value(surface.form, surface.params, *places)
    at, best = drawn.argmin(1), int(curve.argmin())
    step = math.log(2) / (grid[1] - grid[0])
    halved, doubled = (
        float(curve[int(np.clip(best + round(k * step), 0, len(grid) - 1))] - curve[best])
        for k in (-1, 1)
    )
    size = unique.pop() if len(unique) == 1 else 0
    return Optimum(
        flops,
        float(n[best]),
        span(n[at], float(n[best])),
        float(depths[best]),
        span(depths[at], float(depths[best])),
        float(d[best]),
        span(d[at], float(d[best])),
        float(d[best]) / size if size else math.nan,
        float(curve[best]),
        span(drawn.min(1), float(curve[best])),
        halved,
        doubled,
        flops > max(run.flops_exact for run in records),
    )
