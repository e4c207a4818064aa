"""What a report says of the laws: fits, rivals, hold-out tests, compute, data, isoFLOP curves, best sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from var_scale.study.analyse import FLOPS, SIZES, StudyResult
from var_scale.study.document import Document
from var_scale.study.frontier import RULE
from var_scale.study.isoflop import sentences
from var_scale.study.laws import LawFit
from var_scale.study.optimum import best_surface
from var_scale.study.record import METRICS
from var_scale.study.words import number, span, verdict

CAPTIONS = {
    "laws": "The four laws against model size. Dots: measured. Blue: power law of all sizes with the 95 % band of its line (single runs "
            "scatter more). Orange: the law of all sizes but the largest, its prediction for the largest run, which it never saw, and the "
            "95 % interval of that.",
    "ridge": "What the points say of E and α together: regions that hold both with 50 % (dark) and 95 % (light); an edge at α = 0.003 is "
             "where the search ends. "
             "The cross is the best fit, the circle the power law with the assumed E. Along the ridge all laws fit about equally "
             "well, so an exponent without its E means little.",
    "compute": "Values during training against compute, the Pareto frontier over all runs and its power law. Points before the end of a "
               "run were taken before the learning rate was annealed and lie too high.",
    "data": "Loss against tokens seen, a line a size. Points before the end of a run were taken before the learning rate was annealed.",
    "isoflop": "Average loss against model size at equal compute, and the parabolas; a ring at each minimum.",
}  # fmt: skip


def laws_of_size(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    """Everything against model size."""
    _laws(doc, result, pictures)
    _forms(doc, result)
    _floors(doc, result, pictures)


def tests(doc: Document, result: StudyResult) -> None:
    """What the law foresaw."""
    _test(doc, result)
    _budget_curve(doc, result)


def compute_and_data(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    """Everything against compute and data."""
    _compute(doc, result, pictures)
    _data(doc, result, pictures)
    _isoflop(doc, result, pictures)
    _optima(doc, result)


def _laws(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    doc.heading("The laws, fitted on all sizes")
    doc.paragraph(
        "The paper's form, metric - E = (β N / 1e9)^-α with E fixed, by least squares on logarithms; 95 % intervals from Student's t. "
        "β is n/a where a small exponent puts it below 1e-6 or above 1e6, beyond meaning."
    )
    doc.table(
        ["metric", "law", "E", "α", "α, 95 %", "β", "r", "residual sd"], [_law_row(result.fits[metric, "power"]) for metric in METRICS]
    )
    if "laws" in pictures:
        doc.picture(pictures["laws"], CAPTIONS["laws"])
    if bend := _bends(result):
        doc.paragraph(bend)
    doc.paragraph(
        "With the irreducible part E fitted (variable projection, intervals by profile likelihood). A fit that did not converge "
        "shows its reason only."
    )
    rows = []
    for metric in METRICS:
        fit = result.fits[metric, "power_floor"]
        if fit.converged:
            note = ", ".join(fit.audit["active_bounds"]) or "none"
            rows.append(
                [metric, number(fit.params["E"]), span(fit.intervals["E"]), number(fit.params["alpha"]), span(fit.intervals["alpha"]), note]
            )
        else:
            rows.append([metric, "not converged", fit.reason, "", "", ""])
    doc.table(["metric", "E", "E, 95 %", "α", "α, 95 %", "active bounds"], rows)


def _bends(result: StudyResult) -> str:
    """Whether the points bend away from the straight line: the largest residual and a test of a quadratic term."""
    fits = [fit for metric in METRICS if (fit := result.fits[metric, "power"]).converged]
    if not fits:
        return ""
    worst = {fit.metric: max(zip(fit.residuals, fit.rows, strict=True), key=lambda item: abs(item[0])) for fit in fits}
    tests = {fit.metric: fit.curvature() for fit in fits}
    bent = [metric for metric, (_, p) in tests.items() if p < 0.05]
    local = "; ".join(f"{fit.metric} {', '.join(f'{a:.4f}' for a in fit.local_exponents())}" for fit in fits)
    largest = ", ".join(f"{metric} {100 * value:+.2f} % at {name}" for metric, (value, name) in worst.items())
    text = f"Exponent from each size to the next: {local}. Largest residual: {largest}. "
    shown = ", ".join(f"{metric} p = {p:.2f}" for metric, (_, p) in tests.items() if math.isfinite(p))
    if not shown:
        return text + "Too few sizes to test for a bend."
    if bent:
        text += f"**The law bends** for {', '.join(bent)}: a quadratic term in ln N is significant, so the form is wrong over this range"
    else:
        text += "A quadratic term in ln N is not significant"
    return f"{text} ({shown}; with {fits[0].freedom - 1} degrees of freedom only a strong bend would be)."


def _law_row(fit: LawFit) -> list[str]:
    if not fit.converged:
        return [fit.metric, f"not converged: {fit.reason}", "", "", "", "", "", ""]
    p = fit.params
    beta = f"{p['beta']:.4g}" if 1e-6 < p["beta"] < 1e6 else "n/a"  # a small exponent puts it beyond meaning
    return [fit.metric, f"`{fit.equation}`", f"{p['E']:g}", number(p["alpha"]), span(fit.intervals["alpha"]), beta, number(fit.r),
            f"{100 * fit.residual_sd:.2f} %"]  # fmt: skip


def _test(doc: Document, result: StudyResult) -> None:
    doc.heading("Hold-out test: the largest size, predicted from the smaller ones")
    if all(held.prediction is None for held in result.holdouts.values()):
        doc.paragraph(f"Not made: {next(iter(result.holdouts.values())).reason}.")
        return
    rows = []
    for (metric, form), held in result.holdouts.items():
        p = held.prediction
        if p is None:
            rows.append([metric, form, *[""] * 7, verdict(held)])
        else:
            freedom = str(held.fit.freedom) if held.fit else ""
            rows.append([metric, form, ", ".join(held.held), freedom, number(p.value), span((p.low, p.high)), number(held.measured),
                         f"{100 * held.relative_error:+.2f} %", f"{100 * held.gain_fraction:.0f} %", verdict(held)])  # fmt: skip
    doc.table(["metric", "form", "held out", "freedom", "predicted", "95 % prediction", "measured", "error", "of the step",
               "verdict"], rows)  # fmt: skip
    doc.paragraph(
        "`of the step`: the miss as a share of the gain from the next smaller size to the largest; below 100 % the law beats no law. "
        "`freedom`: points less parameters; with one degree of freedom the interval rests on a single number and cannot fail a law."
    )


def _budget_curve(doc: Document, result: StudyResult) -> None:
    curves = {metric: [held for held in curve if held.prediction] for metric, curve in result.budget_curves.items()}
    if not any(len(curve) > 1 for curve in curves.values()):
        return
    doc.heading("How early the largest size could be foreseen")
    doc.paragraph("The largest size predicted by the power law of the smallest sizes alone, with the training FLOP of those.")
    rows = []
    for metric, curve in curves.items():
        for held in curve:
            assert held.prediction and held.fit
            largest = max(held.fit.x)
            spent = sum(run.flops_exact for run in result.gate.kept if run.size(result.size) <= largest)
            p = held.prediction
            rows.append([metric, len(held.fit.x), f"{spent:.3g}", number(p.value), span((p.low, p.high)),
                         number(held.measured), f"{100 * held.relative_error:+.2f} %", verdict(held)])  # fmt: skip
    doc.table(["metric", "sizes", "train FLOP", "predicted", "95 % prediction", "measured", "error", "verdict"], rows)


def exponents_by_scale(doc: Document, result: StudyResult) -> None:
    if not any(fit.converged for fits in result.by_scale.values() for fit in fits):
        return
    doc.paragraph("The exponent of each scale by itself (power law, E = 0):")
    count = max(len(fits) for fits in result.by_scale.values())
    rows = [[f"{name} {what}", *((number(fit.params["alpha"]) if what == "α" else span(fit.intervals["alpha"])) if fit.converged else "none"
                                 for fit in fits)]
            for name, fits in result.by_scale.items() for what in ("α", "95 %")]  # fmt: skip
    doc.table(["", *(f"scale {k + 1}" for k in range(count))], rows)


def _floors(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    doc.heading("How much the exponent depends on an assumed floor E")
    doc.paragraph(
        "The paper's laws are of the loss above an irreducible part that was set by hand. The exponent moves with it while r hardly does."
    )
    for metric in ("loss_last", "loss_avg"):
        strip = result.strips[metric]
        if strip:
            doc.table([metric, *(f"E = {row['E']:.3g}" for row in strip)], [
                ["α", *(number(row["alpha"]) for row in strip)], ["r", *(number(row["r"]) for row in strip)],
                ["residual sd", *(f"{100 * row['residual_sd']:.2f} %" for row in strip)],
            ])  # fmt: skip
    if "ridge" in pictures:
        doc.picture(pictures["ridge"], CAPTIONS["ridge"])
    if any(math.isfinite(value) for value in result.alpha_by_size["loss_avg"].values()):
        doc.paragraph("The exponent of the power law by how N is counted:")
        doc.table(["N", *METRICS], [[f"`{way}`", *(number(result.alpha_by_size[metric][way]) for metric in METRICS)] for way in SIZES])


def _compute(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    doc.heading("Compute frontier")
    doc.paragraph(f"Rule: {RULE}.")
    rows = []
    for metric, front in result.frontiers.items():
        fit = front.fit
        if fit.converged:
            rows.append([metric, f"`{fit.equation}`", number(fit.params["alpha"]), span(front.alpha_interval), number(fit.r), len(fit.x)])
        else:
            rows.append([metric, f"not converged: {fit.reason}", "", "", "", len(fit.x)])
    doc.table(["metric", "law (C in training FLOPs)", "α", "α, 95 % bootstrap by run", "r", "points"], rows)
    if "compute" in pictures:
        doc.picture(pictures["compute"], CAPTIONS["compute"])
    if any(math.isfinite(value) for value in result.alpha_by_flops["loss_avg"].values()):
        doc.paragraph("The exponent by how FLOPs are counted (`flops_exact`: above; `flops_6nd`: 6 N D; `flops_paper`: forward MACs, which "
                      "the paper's figures agree with):")  # fmt: skip
        doc.table(["C", *METRICS], [[f"`{way}`", *(number(result.alpha_by_flops[metric][way]) for metric in METRICS)] for way in FLOPS])
    front = result.frontiers["loss_avg"]
    if math.isfinite(front.size_exponent):
        text = f"N ~ C^{front.size_exponent:.2f} (95 % {span(front.size_interval, 2)}, bootstrap by run)"
        doc.paragraph(f"The size that holds the frontier of the average loss grows as {text}. Runs that were not annealed where they "
                      "hold it bias this.")  # fmt: skip


def _isoflop(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    if result.isoflop is None:
        return
    doc.heading("IsoFLOP curves")
    doc.paragraph("Runs of equal compute, average loss: a parabola over ln N for each budget, and how its minimum moves with compute.")
    doc.bullets(sentences(result.isoflop))
    if "isoflop" in pictures:
        doc.picture(pictures["isoflop"], CAPTIONS["isoflop"])


def _forms(doc: Document, result: StudyResult) -> None:
    """Which form the points prefer."""
    if not any(sum(math.isfinite(fit.aicc) for fit in fits.values()) > 1 for fits in result.rivals.values()):
        doc.heading("Which form?")
        doc.paragraph("Too few sizes to compare forms by AICc: the law with a floor needs six.")
        return
    doc.heading("Which form?")
    doc.paragraph(
        "Akaike's criterion for small samples (AICc) less the best form's: 0 is the best, below 2 as good as the best, above 10 out of "
        "question. It judges the fit on these sizes, not the extrapolation. `broken_power` has two exponents about a break."
    )
    names = list(next(iter(result.rivals.values())))
    rows = []
    for metric, fits in result.rivals.items():
        values = {form: fit.aicc for form, fit in fits.items() if math.isfinite(fit.aicc)}
        best = min(values.values(), default=math.nan)
        rows.append([metric, *(f"{values[form] - best:.1f}" if form in values else fits[form].reason or "too few sizes" for form in names)])
    doc.table(["metric", *(f"`{name}`" for name in names)], rows)


def _data(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    doc.heading("Data")
    known = sorted({round(run.epochs, 3) for run in result.gate.kept if math.isfinite(run.epochs)})
    ends = " to ".join(f"{e:.3g}" for e in sorted({known[0], known[-1]})) if known else ""
    passes = f" Passes of the runs over their training set: {ends}." if known else ""
    doc.paragraph("The best value of any size at each number of tokens seen, and its power law. Against passes over one training set the "
                  f"exponent is the same.{passes} Values before the end of a run were taken before the learning rate was annealed, so this "
                  "is a law of the schedule too; runs of several lengths give a cleaner one.")  # fmt: skip
    rows = []
    for metric, front in result.data_frontiers.items():
        fit = front.fit
        alone = len({point.run for point in front.points}) < 3
        interval = "n/a: fewer than three runs hold it" if alone else span(front.alpha_interval)
        rows.append([metric, f"`{fit.equation}`", number(fit.params["alpha"]), interval, len(fit.x)] if fit.converged
                    else [metric, f"not converged: {fit.reason}", "", "", len(fit.x)])  # fmt: skip
    doc.table(["metric", "law", "α", "α, 95 % bootstrap by run", "points"], rows)
    if "data" in pictures:
        doc.picture(pictures["data"], CAPTIONS["data"])
    if laws := [fit for metric in ("loss_last", "loss_avg") for fit in result.data_laws[metric]]:
        doc.paragraph("From finished runs alone, whose learning rate was annealed, a law a size:")
        sizes = {name: run.depth for run in result.records for name in [run.name]}
        doc.table(["metric", "size", "law", "α", "α, 95 %"], [
            [fit.metric, f"d{sizes[fit.rows[0].split('+')[0]]}",
             *((f"`{fit.equation}`", number(fit.params["alpha"]), span(fit.intervals["alpha"])) if fit.converged else (fit.reason, "", ""))]
            for fit in laws
        ])  # fmt: skip


def _optima(doc: Document, result: StudyResult) -> None:
    """The surface of size and data, and the best size for a compute."""
    doc.heading("Best size and data for a compute")
    surface = best_surface(result.surfaces)
    if surface is None:
        reason = result.surfaces["chinchilla"].reason
        doc.paragraph(f"Not known: a surface of size and data needs sizes trained for several lengths each ({reason}). Sweep "
                      "`study.flops` or `study.grid: {train.epochs: [...]}`.")  # fmt: skip
        return
    doc.bullets([f"`{form}`: {fit.equation}" + (f" (AICc {fit.aicc:.1f})" if math.isfinite(fit.aicc) else "")
                 for form, fit in result.surfaces.items()])  # fmt: skip
    doc.paragraph(f"Average loss at its lowest by the form `{surface.form}`, 95 % bootstrap by run; the last columns say what another size "
                  "with the same compute would lose.")  # fmt: skip
    doc.table(["train FLOP", "depth", "95 %", "N", "tokens", "passes", "loss", "95 %", "half the size", "twice the size"], [
        [f"{best.flops:.2e}" + (" (extrapolated)" if best.beyond else ""), number(best.depth, 1), span(best.depth_interval, 1),
         f"{best.n:.3g}", f"{best.tokens:.3g}", number(best.epochs, 1), number(best.loss), span(best.loss_interval), f"+{best.halved:.4f}",
         f"+{best.doubled:.4f}"] for best in result.optima
    ])  # fmt: skip
