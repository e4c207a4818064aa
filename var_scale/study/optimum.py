"""What to train with a given compute: the size and the data at which the surface L(N, D) is lowest at that many FLOPs.

FLOPs a token are those of the study's own runs, interpolated in ln N: exact counts, not 6 N. With the form `repeated` the data are the
study's, seen again and again; with `chinchilla` every token counts as new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from var_scale.study.laws import LEVEL, NAMES, SURFACES, Array, LawFit, law_value
from var_scale.study.record import RunRecord
from var_scale.study.surface import fit_surface

DRAWS = 100
REACH = 8.0
"""sizes looked at, beyond the study's smallest and largest by this factor"""
Span = tuple[float, float]


@dataclass(frozen=True)
class Optimum:
    """The best run of a compute budget, with 95 % intervals from the surface's draws."""

    flops: float
    n: float
    n_interval: Span
    depth: float
    depth_interval: Span
    tokens: float
    tokens_interval: Span
    epochs: float
    """passes over the study's training set; NaN where its size is not known"""
    loss: float
    loss_interval: Span
    """of the law there, without the noise of a run"""
    halved: float
    """what half the best size, trained longer with the same compute, would lose (nats)"""
    doubled: float
    beyond: bool
    """more compute than any run had: extrapolated"""


def fit_surfaces(records: Sequence[RunRecord], metric: str = "loss_avg", seed: int = 0) -> dict[str, LawFit]:
    """The surfaces of final values, both forms; without enough sizes and token counts they carry the reason."""
    runs = [run for run in records if math.isfinite(run.metric(metric)) and run.metric(metric) > 0]
    n, d, y = [run.params_paper for run in runs], [run.tokens for run in runs], [run.metric(metric) for run in runs]
    names = [run.name for run in runs]
    fits = {"chinchilla": fit_surface(n, d, y, rows=names, draws=DRAWS, seed=seed, metric=metric)}
    if all(run.unique_tokens for run in runs):
        fits["repeated"] = fit_surface(n, d, y, [run.unique_tokens for run in runs], rows=names, draws=DRAWS, seed=seed, metric=metric)
    return fits


def best_surface(fits: dict[str, LawFit]) -> LawFit | None:
    """The converged one with the smaller AICc; chinchilla where that says nothing."""
    found = [fit for fit in fits.values() if fit.converged]
    return min(found, key=lambda fit: (fit.aicc if math.isfinite(fit.aicc) else math.inf, SURFACES.index(fit.form)), default=None)


def optimum(surface: LawFit, records: Sequence[RunRecord], flops: float) -> Optimum:
    """The best size for so many training FLOPs. `records`: the runs that the surface was fitted to."""
    sizes = {run.params_paper: run for run in sorted(records, key=lambda run: run.params_paper)}
    known = np.log(np.array(list(sizes), dtype=float))
    grid = np.linspace(known[0] - math.log(REACH), known[-1] + math.log(REACH), 2000)
    per_token = np.interp(grid, known, [math.log(run.flops_exact / run.tokens) for run in sizes.values()])
    per_token += np.clip(grid - known[-1], 0, None) + np.clip(grid - known[0], None, 0)  # beyond the study in proportion to N
    n, d = np.exp(grid), flops / np.exp(per_token)
    unique = {run.unique_tokens for run in records}
    places = [n, d] + ([np.full_like(d, max(unique))] if surface.form == "repeated" else [])
    draws = np.asarray(surface.draws)
    columns = {name: draws[:, k, None] for k, name in enumerate(NAMES[surface.form])}
    drawn = law_value(surface.form, columns, *(place[None, :] for place in places))
    at = drawn.argmin(1)
    curve = law_value(surface.form, surface.params, *places)
    best = int(curve.argmin())
    depths = np.exp(np.interp(grid, known, [math.log(run.depth) for run in sizes.values()])
                    + (np.clip(grid - known[-1], 0, None) + np.clip(grid - known[0], None, 0)) / 3)  # fmt: skip
    step = math.log(2) / (grid[1] - grid[0])
    near = [float(curve[int(np.clip(best + round(k * step), 0, len(grid) - 1))] - curve[best]) for k in (-1, 1)]
    size = unique.pop() if len(unique) == 1 else 0
    return Optimum(flops, float(n[best]), _span(n[at], n[best]), float(depths[best]), _span(depths[at], depths[best]), float(d[best]),
                   _span(d[at], d[best]), float(d[best]) / size if size else math.nan, float(curve[best]),
                   _span(drawn.min(1), curve[best]), near[0], near[1], flops > max(run.flops_exact for run in records))  # fmt: skip


def _span(values: Array, best: float) -> Span:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return min(float(low), float(best)), max(float(high), float(best))


def sentence(best: Optimum) -> str:
    """An optimum in words."""
    passes = f", {best.epochs:.3g} passes over the data" if math.isfinite(best.epochs) else ""
    low, high = best.depth_interval
    beyond = " (extrapolated)" if best.beyond else ""
    return (f"{best.flops:.2e} FLOP{beyond}: depth {best.depth:.1f} (95 % {low:.1f} to {high:.1f}), "
            f"N {best.n:.3g}, {best.tokens:.3g} tokens{passes}, loss {best.loss:.4f} ({best.loss_interval[0]:.4f} to "
            f"{best.loss_interval[1]:.4f}); half the size, trained longer, +{best.halved:.4f}, twice +{best.doubled:.4f}")  # fmt: skip
