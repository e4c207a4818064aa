"""From records to the result of a study: gate, hold-out test, fits, frontier. No files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from var_scale.laws.adequacy import SIGNIFICANT, Adequacy, adequacy
from var_scale.laws.curve import fit_law, floor_strip
from var_scale.laws.forms import Form
from var_scale.laws.groups import Groups, group
from var_scale.laws.law import LawFit, plain
from var_scale.laws.ridge import Ridge, ridge_regions
from var_scale.records.frontier import Frontier, fit_frontier, frontier_law
from var_scale.records.gate import DESIGNED, GateResult, best_of_variants, gate
from var_scale.records.holdout import HoldOut, budget_curve, hold_out, hold_out_surface
from var_scale.records.isoflop import IsoFlop, fit_isoflop
from var_scale.records.optimum import Optimum, best_surface, fit_surfaces, optimum
from var_scale.records.record import METRICS, RunRecord, by_size
from var_scale.records.sizes import seed_noise, size_means

FORMS: tuple[Form, ...] = ("power", "power_floor")
RIVALS: tuple[Form, ...] = ("power", "power_floor", "broken_power")
SIZES = ("params_paper", "params_total")
FLOPS = ("flops_exact", "flops_6nd", "flops_paper")
BUDGETS = (0.1, 1.0, 10.0)
"""Compute budgets, as multiples of the largest run's, for which the best size is sought."""
Strips = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class StudyResult:
    """All results of a study. Keys of `fits` and `holdouts` are (metric, form)."""

    records: tuple[RunRecord, ...]
    gate: GateResult
    floors: dict[str, float]
    """Floors that the form power assumes, 0 unless given."""
    fits: dict[tuple[str, str], LawFit]
    holdouts: dict[tuple[str, str], HoldOut]
    adequacy: dict[tuple[str, str], Adequacy]
    """Tests of the form of every converged fit."""
    frontiers: dict[str, Frontier]
    """metric -> frontier along compute"""
    data_frontiers: dict[str, Frontier]
    """metric -> frontier along tokens"""
    data_laws: dict[str, tuple[LawFit, ...]]
    """metric -> power laws in tokens, one per size with three annealed runs of other lengths"""
    surfaces: dict[str, LawFit]
    """form -> surface of average loss over parameters and tokens"""
    optima: tuple[Optimum, ...]
    """Best run of the compute budgets BUDGETS by the better surface."""
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
    """metric -> the largest size predicted from ever more of the smallest sizes, leading form"""
    isoflop: IsoFlop | None
    """Curves of equal compute of the average loss, where the runs allow them."""
    seed_sd: dict[str, float]
    """metric -> pooled relative standard deviation between seeds of a size; NaN without repeats"""
    sweep: tuple[RunRecord, ...] = ()
    """Runs of another study, which tried several learning rates for the sizes of this one."""

    @property
    def healthy(self) -> list[RunRecord]:
        """Runs that passed the gate, with all points of a grid."""
        rest = [item.record for item in self.gate.excluded if item.code in DESIGNED]
        return by_size([*self.gate.kept, *rest])

    def leading(self, metric: str) -> Form:
        """The form that stands for a metric: the power law with the assumed floor, unless the
        points reject it as a floor would and the law with a fitted floor exists."""
        return leading_form(self.fits, self.adequacy, metric)

    def law(self, metric: str) -> LawFit:
        """The law of a metric in its leading form."""
        return self.fits[metric, self.leading(metric)]

    def holdout(self, metric: str) -> HoldOut:
        """The hold-out test of a metric: by the surface of size and data where the smaller sizes
        have one, which uses all lengths, otherwise by the leading form."""
        form = self.surface.form if self.surface else self.leading(metric)
        return self.holdouts.get((metric, form), self.holdouts[metric, self.leading(metric)])

    def rejected(self, metric: str) -> bool:
        """Whether the points contradict even the leading form of a metric."""
        tests = self.adequacy.get((metric, self.leading(metric)))
        return tests is not None and tests.rejected

    @property
    def counted(self) -> str:
        """The field of the records that is N: params_paper or params_total."""
        return self.records[0].counted if self.records else "params_paper"

    @property
    def surface(self) -> LawFit | None:
        """The better surface of size and data, where one converged."""
        return best_surface(self.surfaces)

    def ridge(self, metric: str) -> Ridge:
        """The values of E and the exponent that the points of a metric allow together. The form
        power_floor must have converged."""
        return ridge_regions(self.fits[metric, "power_floor"])

    def to_json(self) -> dict[str, Any]:
        """Content of fit.json."""
        return {
            "version": 1,
            "size": self.counted,
            "floors": plain(self.floors),
            "gate": {
                "kept": [run.name for run in self.gate.kept],
                "excluded": [
                    [item.record.name, item.code, item.text] for item in self.gate.excluded
                ],
            },
            "fits": [fit.to_json() for fit in self.fits.values()],
            "holdouts": [held.to_json() for held in self.holdouts.values()],
            "leading": {metric: self.leading(metric) for metric in METRICS},
            "adequacy": [
                {"metric": metric, "form": form, "rejected": tests.rejected, **plain(asdict(tests))}
                for (metric, form), tests in self.adequacy.items()
            ],
            "frontiers": [front.to_json() for front in self.frontiers.values()],
            "data_frontiers": [front.to_json() for front in self.data_frontiers.values()],
            "data_laws": [fit.to_json() for fits in self.data_laws.values() for fit in fits],
            "surfaces": {form: fit.to_json() for form, fit in self.surfaces.items()},
            "optima": [plain(asdict(o)) for o in self.optima],
            "floor_strips": plain(self.strips),
            "alpha_by_size": plain(self.alpha_by_size),
            "alpha_by_flops": plain(self.alpha_by_flops),
            "aicc": {
                metric: {form: plain(fit.aicc) for form, fit in fits.items()}
                for metric, fits in self.rivals.items()
            },
            "seed_sd": plain(self.seed_sd),
            "isoflop": plain(self.isoflop.to_json() if self.isoflop else None),
            "by_scale": {
                name: [fit.to_json() for fit in fits] for name, fits in self.by_scale.items()
            },
            "budget_curves": {
                metric: [held.to_json() for held in curve]
                for metric, curve in self.budget_curves.items()
            },
        }


def fit_study(
    records: Sequence[RunRecord],
    *,
    floors: dict[str, float] | None = None,
    seed: int = 0,
    exclude: dict[str, str] | None = None,
    keep: dict[str, str] | None = None,
) -> StudyResult:
    """Gate the runs; for each metric and form predict the held-out largest size, then fit all.

    With too few healthy runs the fits carry their reason; nothing raises for them.

    Args:
        floors: assumed irreducible part of a metric. The authors of the VAR paper used 4.5 for
            loss_last and 5.0 for loss_avg on ImageNet-256.
        seed: seed of the bootstraps.
        exclude: runs that the gate excludes, by name with the reason.
        keep: runs that the gate keeps, by name with the reason.
    """
    result = gate(records, exclude=exclude, keep=keep)
    healthy = result.kept
    kept, beaten = best_of_variants(healthy)
    result = GateResult(kept, (*result.excluded, *beaten))
    assumed = {metric: (floors or {}).get(metric, 0.0) for metric in METRICS}
    left_out = [(item.record.name, item.code, item.text) for item in result.excluded]
    fits: dict[tuple[str, str], LawFit] = {}
    tests: dict[tuple[str, str], Adequacy] = {}
    broken: dict[str, LawFit] = {}
    strips: Strips = {}
    for metric, floor in assumed.items():
        points = size_means(kept, metric)
        ns, values = points.sizes, points.values
        common: dict[str, Any] = {
            "metric": metric,
            "repeats": points.repeats,
            "floor": floor,
            "rows": points.names,
            "seed": seed,
        }
        for form in FORMS:
            fits[metric, form] = fit_law(form, ns, values, excluded=left_out, **common)
        for form in FORMS:
            if (law := fits[metric, form]).converged:
                rival = fits[metric, "power_floor"] if form == "power" else None
                tests[metric, form] = adequacy(law, rival)
        broken[metric] = fit_law("broken_power", ns, values, **common)
        strips[metric] = floor_strip(ns, values) if values else []
    holdouts: dict[tuple[str, str], HoldOut] = {
        (metric, form): hold_out(kept, metric, form, floor=floor, seed=seed)
        for metric, floor in assumed.items()
        for form in FORMS
    }
    surfaces = fit_surfaces(healthy, seed=seed)
    surface = best_surface(surfaces)
    if surface and (held := hold_out_surface(healthy, "loss_avg", surface.form, seed)):
        holdouts["loss_avg", held.form] = held
    largest = max((run.flops_exact for run in healthy), default=0)
    return StudyResult(
        tuple(records),
        result,
        assumed,
        fits,
        holdouts=holdouts,
        adequacy=tests,
        frontiers={m: fit_frontier(healthy, m, floor, seed) for m, floor in assumed.items()},
        data_frontiers={
            m: fit_frontier(healthy, m, floor, seed, "tokens") for m, floor in assumed.items()
        },
        data_laws={m: laws_of_data(healthy, m, floor) for m, floor in assumed.items()},
        surfaces=surfaces,
        optima=tuple(optimum(surface, healthy, largest * factor) for factor in BUDGETS)
        if surface
        else (),
        strips=strips,
        alpha_by_size={
            m: {way: _alpha(power_law(size_means(kept, m, way), m, floor)) for way in SIZES}
            for m, floor in assumed.items()
        },
        alpha_by_flops={
            m: {way: _alpha(frontier_law(healthy, m, floor, way)) for way in FLOPS}
            for m, floor in assumed.items()
        },
        rivals={m: {form: fits.get((m, form), broken[m]) for form in RIVALS} for m in METRICS},
        by_scale={name: by_scale(kept, name) for name in ("loss", "err")},
        budget_curves={
            m: budget_curve(kept, m, leading_form(fits, tests, m), floor)
            for m, floor in assumed.items()
        },
        isoflop=fit_isoflop(healthy, surfaces["chinchilla"]),
        seed_sd={metric: seed_noise(kept, metric) for metric in METRICS},
    )


def leading_form(
    fits: dict[tuple[str, str], LawFit], tests: dict[tuple[str, str], Adequacy], metric: str
) -> Form:
    """See `StudyResult.leading`."""
    plain_law, free = fits[metric, "power"], fits[metric, "power_floor"]
    if not plain_law.converged or not free.converged:
        return "power"
    test, rest = tests[metric, "power"], tests[metric, "power_floor"]
    # A misfit without a bend, such as a bad recipe at one size, is not repaired by a floor.
    bent = test.bend > 0 and (test.p_bend < SIGNIFICANT or (test.rejected and not rest.rejected))
    return "power_floor" if bent and free.params["E"] > plain_law.params["E"] else "power"


def power_law(points: Groups, metric: str, floor: float = 0.0, variable: str = "N") -> LawFit:
    """The power law of these points."""
    common: dict[str, Any] = {"metric": metric, "variable": variable, "floor": floor}
    return fit_law("power", points.sizes, points.values, rows=points.names, **common)


def _alpha(fit: LawFit) -> float:
    """The exponent, NaN without a law."""
    return fit.params.get("alpha", math.nan)


def laws_of_data(healthy: Sequence[RunRecord], metric: str, floor: float) -> tuple[LawFit, ...]:
    """Power laws in tokens of each size that has three lengths.

    Only from the ends of runs, because their learning rate was annealed: the loss during a run is
    not comparable.
    """
    groups = [
        [run for run in healthy if run.params_paper == n]
        for n in sorted({run.params_paper for run in healthy})
    ]
    return tuple(
        power_law(size_means(runs, metric, "tokens"), metric, floor, "tokens")
        for runs in groups
        if len({run.tokens for run in runs}) >= 3
    )


def by_scale(kept: Sequence[RunRecord], name: str) -> tuple[LawFit, ...]:
    """The power law of every scale of the token pyramid with E = 0; `name` is loss or err."""
    runs = [run for run in kept if getattr(run, f"{name}_per_scale")]
    columns = zip(*(getattr(run, f"{name}_per_scale") for run in runs), strict=False)
    names, sizes = [run.name for run in runs], [float(run.n) for run in runs]
    return tuple(
        power_law(group(names, sizes, values), f"{name}_scale_{scale}")
        for scale, values in enumerate(columns, 1)
    )
