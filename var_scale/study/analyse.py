"""From records to result: gate, hold-out test, fit on all sizes, frontier. One call, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from var_scale.study.frontier import Frontier, fit_frontier, frontier_law
from var_scale.study.gate import GateResult, best_of_variants, gate
from var_scale.study.holdout import HoldOut, budget_curve, hold_out, noise_floor
from var_scale.study.isoflop import IsoFlop, fit_isoflop
from var_scale.study.laws import Form, LawFit, plain
from var_scale.study.optimum import Optimum, best_surface, fit_surfaces, optimum
from var_scale.study.power import fit_law, floor_strip
from var_scale.study.record import METRICS, RunRecord, seed_noise, size_means

FORMS: tuple[Form, ...] = ("power", "power_floor")
RIVALS: tuple[Form, ...] = ("power", "power_floor", "broken_power")
SIZES = ("params_paper", "params_total")
FLOPS = ("flops_exact", "flops_6nd", "flops_paper")
BUDGETS = (0.1, 1.0, 10.0)
"""of the largest run's compute: where the best size is sought"""
Strips = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class StudyResult:
    """All that a study has to say. Keys of `fits` and `holdouts` are (metric, form)."""

    records: tuple[RunRecord, ...]
    gate: GateResult
    size: str
    floors: dict[str, float]
    """floors assumed by the form power, 0 unless given"""
    fits: dict[tuple[str, str], LawFit]
    holdouts: dict[tuple[str, str], HoldOut]
    frontiers: dict[str, Frontier]
    """metric -> along compute"""
    data_frontiers: dict[str, Frontier]
    """metric -> along tokens"""
    data_laws: dict[str, tuple[LawFit, ...]]
    """metric -> of each size with three annealed runs of different length, the power law in tokens"""
    surfaces: dict[str, LawFit]
    """form -> surface of average loss over parameters and tokens"""
    optima: tuple[Optimum, ...]
    """best run of some compute budgets by the better surface"""
    strips: Strips
    """metric -> exponent and correlation at assumed floors"""
    alpha_by_size: dict[str, dict[str, float]]
    """metric -> exponent of the power law by each way of counting N"""
    alpha_by_flops: dict[str, dict[str, float]]
    """metric -> exponent of the compute frontier by each way of counting FLOPs"""
    rivals: dict[str, dict[str, LawFit]]
    """metric -> form -> fit of all sizes, for AICc"""
    by_scale: dict[str, tuple[LawFit, ...]]
    """loss and err -> the power law of each scale, E = 0"""
    budget_curves: dict[str, tuple[HoldOut, ...]]
    """metric -> the largest size predicted from the 3, 4, ... smallest sizes, power law"""
    isoflop: IsoFlop | None
    """curves of equal compute of the average loss, where the runs have them"""
    seed_sd: dict[str, float]
    """metric -> pooled relative standard deviation between seeds of a size; NaN without repeated sizes"""

    @property
    def healthy(self) -> list[RunRecord]:
        """Runs that passed the gate, all points of a grid."""
        beaten = [item.record for item in self.gate.excluded if item.code == "beaten_variant"]
        return sorted([*self.gate.kept, *beaten], key=lambda run: (run.params_paper, run.seed, run.name))

    def to_json(self) -> dict[str, Any]:
        """Content of fit.json."""
        return {
            "version": 1, "size": self.size, "floors": plain(self.floors),
            "gate": {"kept": [run.name for run in self.gate.kept],
                     "excluded": [[item.record.name, item.code, item.text] for item in self.gate.excluded]},
            "fits": [fit.to_json() for fit in self.fits.values()], "holdouts": [held.to_json() for held in self.holdouts.values()],
            "frontiers": [front.to_json() for front in self.frontiers.values()],
            "data_frontiers": [front.to_json() for front in self.data_frontiers.values()],
            "data_laws": [fit.to_json() for fits in self.data_laws.values() for fit in fits],
            "surfaces": {form: fit.to_json() for form, fit in self.surfaces.items()}, "optima": [plain(asdict(o)) for o in self.optima],
            "floor_strips": plain(self.strips),
            "alpha_by_size": plain(self.alpha_by_size), "alpha_by_flops": plain(self.alpha_by_flops),
            "aicc": {metric: {form: plain(fit.aicc) for form, fit in fits.items()} for metric, fits in self.rivals.items()},
            "seed_sd": plain(self.seed_sd),
            "isoflop": plain(self.isoflop.to_json() if self.isoflop else None),
            "by_scale": {name: [fit.to_json() for fit in fits] for name, fits in self.by_scale.items()},
            "budget_curves": {metric: [held.to_json() for held in curve] for metric, curve in self.budget_curves.items()},
        }  # fmt: skip


def fit_study(
    records: Sequence[RunRecord], *, size: str = "params_paper", floors: dict[str, float] | None = None, seed: int = 0,
    exclude: dict[str, str] | None = None, keep: dict[str, str] | None = None,
) -> StudyResult:  # fmt: skip
    """Gate the runs, then for each metric and form: hold out the largest size, predict it, and fit again on all sizes.

    `floors` assumes an irreducible part for a metric (the paper's authors used 4.5 for loss_last and 5.0 for loss_avg on ImageNet-256).
    `exclude` and `keep`: runs by name, with a person's reason, that the gate is told about. With too few healthy runs the fits carry
    their reason; nothing raises.
    """
    result = gate(records, exclude=exclude, keep=keep)
    healthy = result.kept
    kept, beaten = best_of_variants(healthy)
    result = GateResult(kept, (*result.excluded, *beaten))
    assumed = {metric: (floors or {}).get(metric, 0.0) for metric in METRICS}
    left_out = [(item.record.name, item.code, item.text) for item in result.excluded]
    fits: dict[tuple[str, str], LawFit] = {}
    holdouts: dict[tuple[str, str], HoldOut] = {}
    strips: Strips = {}
    by_size: dict[str, dict[str, float]] = {}
    rivals: dict[str, dict[str, LawFit]] = {}
    noise = {metric: seed_noise(kept, metric) for metric in METRICS}
    for metric in METRICS:
        names, ns, values = size_means(kept, metric, size)
        for form in FORMS:
            fits[metric, form] = fit_law(form, ns, values, metric=metric, floor=assumed[metric], rows=names, excluded=left_out,
                                         noise_floor=noise_floor(kept, metric), seed=seed)  # fmt: skip
            holdouts[metric, form] = hold_out(kept, metric, form, floor=assumed[metric], size=size, seed=seed)
        broken = fit_law("broken_power", ns, values, metric=metric, floor=assumed[metric], rows=names, seed=seed)
        rivals[metric] = {form: broken if form == "broken_power" else fits[metric, form] for form in RIVALS}
        strips[metric] = floor_strip(ns, values) if values else []
        by_size[metric] = {}
        for way in SIZES:
            fit = fit_law("power", *size_means(kept, metric, way)[1:], metric=metric, floor=assumed[metric])
            by_size[metric][way] = fit.params.get("alpha", math.nan)
    curves = {metric: budget_curve(kept, metric, assumed[metric], size) for metric in METRICS}
    frontiers = {metric: fit_frontier(healthy, metric, assumed[metric], seed) for metric in METRICS}
    surfaces = fit_surfaces(healthy, seed=seed)
    surface = best_surface(surfaces)
    budgets = [max(run.flops_exact for run in healthy) * factor for factor in BUDGETS] if surface else []
    return StudyResult(
        tuple(records), result, size, assumed, fits, holdouts, frontiers,
        data_frontiers={metric: fit_frontier(healthy, metric, assumed[metric], seed, "tokens") for metric in METRICS},
        data_laws={metric: laws_of_data(healthy, metric, assumed[metric]) for metric in METRICS}, surfaces=surfaces,
        optima=tuple(optimum(surface, healthy, budget) for budget in budgets) if surface else (), strips=strips, alpha_by_size=by_size,
        alpha_by_flops={metric: alpha_by_flops(healthy, metric, assumed[metric]) for metric in METRICS}, rivals=rivals,
        by_scale=by_scale(kept, size), budget_curves=curves, isoflop=fit_isoflop(healthy, surface=surfaces["chinchilla"]), seed_sd=noise,
    )  # fmt: skip


def alpha_by_flops(healthy: Sequence[RunRecord], metric: str, floor: float) -> dict[str, float]:
    """The frontier's exponent when compute is counted as each of FLOPS."""
    found = {}
    for way in FLOPS:
        scaled = []
        for run in healthy:
            ratio = getattr(run, way) / run.flops_exact
            curve = tuple(point._replace(flops_exact=point.flops_exact * ratio) for point in run.curve)
            scaled.append(replace(run, flops_exact=getattr(run, way), curve=curve))
        found[way] = frontier_law(scaled, metric, floor).params.get("alpha", math.nan)
    return found


def laws_of_data(healthy: Sequence[RunRecord], metric: str, floor: float) -> tuple[LawFit, ...]:
    """Power laws in tokens from finished runs alone, whose learning rate was annealed: one each size that has three lengths."""
    fits = []
    for n in sorted({run.params_paper for run in healthy}):
        runs = [run for run in healthy if run.params_paper == n]
        if len({run.tokens for run in runs}) >= 3:
            names, tokens, values = size_means(runs, metric, "tokens")
            fits.append(fit_law("power", tokens, values, metric=metric, variable="tokens", floor=floor, rows=names))
    return tuple(fits)


def by_scale(kept: Sequence[RunRecord], size: str) -> dict[str, tuple[LawFit, ...]]:
    """The power law of every scale of the token pyramid, its loss and its error rate, E = 0."""
    found: dict[str, tuple[LawFit, ...]] = {}
    for name in ("loss", "err"):
        runs = [run for run in kept if getattr(run, f"{name}_per_scale")]
        scales = min((len(getattr(run, f"{name}_per_scale")) for run in runs), default=0)
        fits = []
        for scale in range(scales):
            one = [replace(run, loss_avg=getattr(run, f"{name}_per_scale")[scale]) for run in runs]
            names, ns, values = size_means(one, "loss_avg", size)
            fits.append(fit_law("power", ns, values, metric=f"{name}_scale_{scale + 1}", rows=names))
        found[name] = tuple(fits)
    return found
