"""The laws of a study as tables of plain values: fits, rivals, hold-out tests, compute, data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from var_scale.laws.bootstrap import span as bootstrap_span
from var_scale.laws.forms import NAMES
from var_scale.laws.law import LawFit
from var_scale.laws.nested import floor_test
from var_scale.records.analyse import FLOPS, SIZES, StudyResult
from var_scale.records.frontier import RULE, Frontier
from var_scale.records.holdout import HoldOut
from var_scale.records.record import METRICS
from var_scale.report.values import number, percent, span, verdict

Rows = list[list[object]]


def law_values(result: StudyResult) -> dict[str, Any]:
    """Everything that the template prints about laws; an empty value hides its part."""
    return {
        "metrics": list(METRICS),
        "laws": [law_row(result.fits[metric, "power"]) for metric in METRICS],
        "bends": bends(result),
        "floor_laws": [floor_row(result.fits[metric, "power_floor"]) for metric in METRICS],
        "forms": forms(result),
        "strips": strips(result),
        "by_size": by_convention(result.alpha_by_size, SIZES),
        "untested": next(iter(result.holdouts.values())).reason,
        "holdouts": holdouts(result),
        "early": early(result),
        "rule": RULE,
        "frontiers": [
            frontier_row(front, [number(front.fit.r)]) for front in result.frontiers.values()
        ],
        "by_flops": by_convention(result.alpha_by_flops, FLOPS),
        "lengths": compute_optimal(result),
        "passes": passes(result),
        "data_frontiers": [frontier_row(front, []) for front in result.data_frontiers.values()],
        "data_laws": data_laws(result),
        "isoflop": isoflop(result),
        "by_scale": by_scale(result),
        **optima(result),
    }


def law_row(fit: LawFit) -> list[object]:
    """The power law of one metric."""
    if not fit.converged:
        return [fit.metric, f"not converged: {fit.reason}", *[""] * 6]
    beta = fit.params["beta"]
    return [
        fit.metric,
        f"`{fit.equation}`",
        f"{fit.params['E']:g}",
        number(fit.params["alpha"]),
        span(fit.intervals["alpha"]),
        # A small exponent moves the paper's beta beyond any meaning.
        f"{beta:.4g}" if 1e-6 < beta < 1e6 else "n/a",
        number(fit.r),
        percent(fit.residual_sd),
    ]


def floor_row(fit: LawFit) -> list[object]:
    """The power law with a fitted floor of one metric."""
    if not fit.converged:
        return [fit.metric, "not converged", fit.reason, "", "", ""]
    return [
        fit.metric,
        number(fit.params["E"]),
        span(fit.intervals["E"]),
        number(fit.params["alpha"]),
        span(fit.intervals["alpha"]),
        ", ".join(fit.audit["active_bounds"]) or "none",
    ]


def bends(result: StudyResult) -> dict[str, Any] | None:
    """Whether the points bend away from the power law: local exponents, the largest residual of
    each metric, and the p-values of a bend."""
    fits = [fit for metric in METRICS if (fit := result.fits[metric, "power"]).converged]
    if not fits:
        return None
    worst = {
        fit.metric: max(zip(fit.residuals, fit.rows, strict=True), key=lambda item: abs(item[0]))
        for fit in fits
    }
    tests = {fit.metric: result.adequacy[fit.metric, "power"].p_bend for fit in fits}
    return {
        "local": [
            f"{fit.metric} {', '.join(f'{a:.4f}' for a in fit.local_exponents())}" for fit in fits
        ],
        "largest": [
            f"{metric} {100 * value:+.2f} % at {name}" for metric, (value, name) in worst.items()
        ],
        "tests": [f"{metric} p = {p:.2g}" for metric, p in tests.items() if math.isfinite(p)],
        "bent": [metric for metric, p in tests.items() if p < 0.05],
        "sizes": len(fits[0].x),
    }


def forms(result: StudyResult) -> dict[str, Any] | None:
    """AICc of every form less that of the best one, and the F test of the assumed floor; None if no
    metric allows a comparison."""
    values = {
        metric: {form: fit.aicc for form, fit in fits.items() if math.isfinite(fit.aicc)}
        for metric, fits in result.rivals.items()
    }
    tests = {
        metric: floor_test(fits["power"], fits["power_floor"])
        for metric, fits in result.rivals.items()
    }
    if all(len(found) < 2 for found in values.values()) and not any(
        map(math.isfinite, tests.values())
    ):
        return None
    names = list(next(iter(result.rivals.values())))
    rows = []
    for metric, fits in result.rivals.items():
        found = values[metric] if len(values[metric]) > 1 else {}  # one form is not a comparison
        best = min(found.values(), default=math.nan)
        cells = [
            f"{found[form] - best:.1f}" if form in found else fits[form].reason or "too few sizes"
            for form in names
        ]
        p = tests[metric]
        rows.append([metric, *cells, f"{p:.2g}" if math.isfinite(p) else "n/a"])
    head = ["metric", *(f"`{name}`" for name in names), "p of the assumed E"]
    return {"head": head, "rows": rows}


def strips(result: StudyResult) -> list[dict[str, Any]]:
    """The exponents of the losses at assumed floors."""
    found = []
    for metric in ("loss_last", "loss_avg"):
        if strip := result.strips[metric]:
            rows = [
                ["α", *(number(row["alpha"]) for row in strip)],
                ["r", *(number(row["r"]) for row in strip)],
                ["residual sd", *(percent(row["residual_sd"]) for row in strip)],
            ]
            found.append(
                {"head": [metric, *(f"E = {row['E']:.3g}" for row in strip)], "rows": rows}
            )
    return found


def by_convention(exponents: dict[str, dict[str, float]], ways: tuple[str, ...]) -> Rows:
    """The exponent of every metric by each way of counting."""
    if not any(map(math.isfinite, exponents["loss_avg"].values())):
        return []
    return [[f"`{way}`", *(number(exponents[metric][way]) for metric in METRICS)] for way in ways]


def prediction(held: HoldOut) -> list[object]:
    """Predicted value, interval, measured value and error of a hold-out test."""
    p = held.prediction
    assert p
    return [
        number(p.value),
        span((p.low, p.high)),
        number(held.measured),
        f"{100 * held.relative_error:+.2f} %",
    ]


def holdouts(result: StudyResult) -> Rows:
    """The hold-out tests; empty if none took place."""
    if all(held.prediction is None for held in result.holdouts.values()):
        return []
    rows: Rows = []
    for (metric, form), held in result.holdouts.items():
        if held.prediction is None:
            rows.append([metric, form, *[""] * 7, verdict(held)])
            continue
        freedom = _freedom(held.fit) if held.fit else ""
        gain = percent(held.gain_fraction, 0)
        names = ", ".join(held.held)
        rows.append([metric, form, names, freedom, *prediction(held), gain, verdict(held)])
    return rows


def _freedom(law: LawFit) -> str:
    """Degrees of freedom of the noise in the intervals of a law."""
    own = law.noise.run.freedom
    return f"{law.freedom if math.isnan(own) else own:.2g}"


def early(result: StudyResult) -> Rows:
    """The largest size predicted from the 3, 4, ... smallest; empty without two predictions."""
    curves = {
        metric: [held for held in curve if held.prediction and held.fit]
        for metric, curve in result.budget_curves.items()
    }
    if all(len(curve) < 2 for curve in curves.values()):
        return []
    rows: Rows = []
    for metric, curve in curves.items():
        for held in curve:
            assert held.fit
            largest = max(held.fit.x)
            spent = sum(run.flops_exact for run in result.gate.kept if run.params_paper <= largest)
            start = [metric, len(held.fit.x), f"{spent:.3g}"]
            rows.append([*start, *prediction(held), verdict(held)])
    return rows


def frontier_row(front: Frontier, extra: list[str]) -> list[object]:
    """The law along a frontier; `extra` cells come before the number of points."""
    fit = front.fit
    if not fit.converged:
        return [
            front.metric,
            f"not converged: {fit.reason}",
            "",
            "",
            *["" for _ in extra],
            len(fit.x),
        ]
    # A bootstrap over one or two runs cannot show how the frontier would move with other runs.
    alone = front.along == "tokens" and len({point.run for point in front.points}) < 3
    interval = "n/a: fewer than three runs are on it" if alone else span(front.alpha_interval)
    alpha = number(fit.params["alpha"])
    return [front.metric, f"`{fit.equation}`", alpha, interval, *extra, len(fit.x)]


def compute_optimal(result: StudyResult) -> dict[str, str] | None:
    """How the best size and the loss go with compute by the surface; None without a surface."""
    surface = result.surface
    if surface is None:
        return None

    def loss(params: dict[str, float]) -> float:
        return params["alpha"] * params["beta"] / (params["alpha"] + params["beta"])

    names = NAMES[surface.form]
    drawn = [loss(dict(zip(names, draw, strict=False))) for draw in surface.draws]
    return {
        "size": f"{surface.params['split']:.3f}",
        "size_interval": span(surface.intervals["split"], 3),
        "loss": f"{loss(surface.params):.3f}",
        "loss_interval": span(bootstrap_span(np.array(drawn), loss(surface.params)), 3),
    }


def passes(result: StudyResult) -> list[str]:
    """The smallest and the largest number of passes over the training set, once if equal."""
    known = sorted({round(run.epochs, 3) for run in result.healthy if math.isfinite(run.epochs)})
    return [f"{value:.3g}" for value in sorted({known[0], known[-1]})] if known else []


def data_laws(result: StudyResult) -> Rows:
    """The laws in tokens of each size that was trained for several lengths."""
    rows: Rows = []
    for metric in ("loss_last", "loss_avg"):
        for fit in result.data_laws[metric]:
            # The name of a row joins those of its seeds by a plus sign.
            first = f"{fit.rows[0]}+"
            depth = next(r.depth for r in result.records if first.startswith(f"{r.name}+"))
            size = f"d{depth}"
            if fit.converged:
                alpha = [number(fit.params["alpha"]), span(fit.intervals["alpha"])]
                rows.append([metric, size, f"`{fit.equation}`", *alpha])
            else:
                rows.append([metric, size, fit.reason, "", ""])
    return rows


def isoflop(result: StudyResult) -> dict[str, Any] | None:
    """The curves of equal compute, and the exponent of the optimal size by both methods."""
    found = result.isoflop
    if found is None:
        return None
    low, high = found.interval
    return {
        "curves": [
            {
                "flops": f"{curve.flops:.3g}",
                "runs": len(curve.sizes),
                "reason": curve.reason,
                "best": f"{curve.best_n:.3g}",
                "loss": curve.best_loss,
            }
            for curve in found.curves
        ],
        "exponent": f"{found.exponent:.3f}" if math.isfinite(found.exponent) else "",
        "interval": f"{low:.3f} to {high:.3f}" if math.isfinite(low) else "",
        "split": f"{found.split:.3f}" if math.isfinite(found.split) else "",
        "difference": f"{found.exponent - found.split:+.3f}",
        "reason": found.surface.reason,
    }


def optima(result: StudyResult) -> dict[str, Any]:
    """The surfaces of size and data, and the best size for several amounts of compute."""
    best = result.surface
    return {
        "best_form": best.form if best else "",
        "no_surface": result.surfaces["chinchilla"].reason,
        "surfaces": {
            form: fit.equation + (f" (AICc {fit.aicc:.1f})" if math.isfinite(fit.aicc) else "")
            for form, fit in result.surfaces.items()
        },
        "optima": [
            [
                f"{run.flops:.2e}" + (" (extrapolated)" if run.beyond else ""),
                number(run.depth, 1),
                span(run.depth_interval, 1),
                f"{run.n:.3g}",
                f"{run.tokens:.3g}",
                number(run.epochs, 1),
                number(run.loss),
                span(run.loss_interval),
                f"+{run.halved:.4f}",
                f"+{run.doubled:.4f}",
            ]
            for run in result.optima
        ],
    }


def by_scale(result: StudyResult) -> dict[str, Any] | None:
    """The exponent of every scale, of loss and error rate."""
    if not any(fit.converged for fits in result.by_scale.values() for fit in fits):
        return None
    rows: Rows = []
    for name, fits in result.by_scale.items():
        alphas = [number(fit.params["alpha"]) if fit.converged else "none" for fit in fits]
        spans = [span(fit.intervals["alpha"]) if fit.converged else "none" for fit in fits]
        rows += [[f"{name} α", *alphas], [f"{name} 95 %", *spans]]
    count = max(len(fits) for fits in result.by_scale.values())
    return {"head": ["", *(f"scale {k + 1}" for k in range(count))], "rows": rows}
