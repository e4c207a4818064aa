"""The report of a study: report.md, report.html (self-contained), runs.csv, fit.json and the pictures, in STUDY/report/."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from var_scale.files import write_json, write_text
from var_scale.progress import duration
from var_scale.study.analyse import SIZES, StudyResult
from var_scale.study.document import Document
from var_scale.study.frontier import RULE
from var_scale.study.gate import CODES
from var_scale.study.holdout import HoldOut
from var_scale.study.isoflop import sentences
from var_scale.study.laws import LawFit
from var_scale.study.plan import short
from var_scale.study.plots import write_plots
from var_scale.study.record import METRICS, write_runs_csv

WEAK = 2.0  # intervals wider than this many steps make a weak hold-out test
CAPTIONS = {
    "laws": "The four laws against model size. Dots: measured. Blue: power law of all sizes with the 95 % band of its line (single runs "
            "scatter more). Orange: the law of all sizes but the largest, its prediction for the largest run, which it never saw, and the "
            "95 % interval of that.",
    "compute": "Loss during training against compute, the Pareto frontier over all runs and its power law. Points before the end of a run "
               "were taken before the learning rate was annealed and lie too high.",
    "isoflop": "Average loss against model size at equal compute, and the parabolas; a ring at each minimum.",
    "residuals": "Residuals of the fits on all sizes. A bend means that the form is wrong over this range.",
    "per_scale": "Loss and error rate of each scale.",
    "samples": "Samples of the largest healthy model, a row a class.",
    "reconstructions": "Validation images above what the tokenizer makes of them: the best that any model on these tokens can draw.",
}  # fmt: skip


def write_report(
    study_dir: Path, result: StudyResult, extra: Mapping[str, str] | None = None, shown: Mapping[str, Path] | None = None
) -> Path:
    """Write STUDY/report/ and return the path of report.html. `extra` adds lines to "What was measured" (title: text), `shown`
    PNG files that exist already: samples, reconstructions."""
    folder = Path(study_dir) / "report"
    for left_over in folder.glob(".*.tmp"):  # of a report that was killed
        left_over.unlink()
    pictures = write_plots(result, folder) | dict(shown or {})
    document = build_document(Path(study_dir).resolve().name, result, pictures, extra or {})
    write_runs_csv(result.records, folder / "runs.csv")
    write_json(folder / "fit.json", result.to_json())
    write_text(folder / "report.md", document.markdown(folder))
    write_text(folder / "report.html", document.html())
    return folder / "report.html"


def build_document(name: str, result: StudyResult, pictures: Mapping[str, Path], extra: Mapping[str, str]) -> Document:
    """The report as a document, in the order a reader asks: result, measurement, runs, gate, laws, test, caveats."""
    doc = Document(f"Scaling study {name}")
    doc.paragraph(headline(result))
    _measured(doc, result, extra)
    _runs(doc, result)
    _gate(doc, result)
    _laws(doc, result, pictures)
    _test(doc, result)
    _budget_curve(doc, result)
    _floors(doc, result)
    _compute(doc, result, pictures)
    _isoflop(doc, result, pictures)
    titles = {"residuals": "Residuals", "per_scale": "Scales", "samples": "Samples", "reconstructions": "Tokenizer"}
    for picture, title in titles.items():
        if picture in pictures:
            doc.heading(title)
            doc.picture(pictures[picture], CAPTIONS[picture] + (_first_scale(result) if picture == "per_scale" else ""))
            if picture == "per_scale":
                _by_scale(doc, result)
    _caveats(doc, result)
    return doc


def _first_scale(result: StudyResult) -> str:
    """The sampling error of the noisiest point of the picture."""
    run = next((run for run in result.gate.kept if run.err_per_scale), None)
    if run is None or run.eval_samples < 1:
        return ""
    error = run.err_per_scale[0]
    return (f" The first scale is one token an image: on {run.eval_samples:,} images its error rate has a standard error of "
            f"{100 * math.sqrt(error * (1 - error) / run.eval_samples):.1f} points.")  # fmt: skip


def headline(result: StudyResult) -> str:
    """The answer in one paragraph, or why there is none."""
    fit, held = result.fits["loss_avg", "power"], result.holdouts["loss_avg", "power"]
    if not fit.converged:
        return f"**There is no law yet**: {fit.reason}. {len(result.gate.kept)} of {len(result.records)} runs passed the health gate."
    low, high = fit.intervals["alpha"]
    text = (f"Over {octaves(result):.1f} octaves of model size the average loss follows `{fit.equation}`. "
            f"{assumed(result, 'loss_avg')}, the exponent is {fit.params['alpha']:.4f} (95 % interval {low:.4f} to {high:.4f}); "
            f"{free_floor(result, 'loss_avg')}.")  # fmt: skip
    if held.prediction is None:
        return f"{text} The hold-out test could not be made: {held.reason}."
    return f"{text} {held_sentence(held)}"


def free_floor(result: StudyResult, metric: str) -> str:
    """What the points say about exponent and floor when no floor is assumed."""
    fit = result.fits[metric, "power_floor"]
    if not fit.converged:
        return f"with E left free there is no fit ({fit.reason})"
    low, high = fit.intervals["E"]
    known = "" if low > 0 or high < 0.5 * min(fit.y) else "; these points do not determine E, so they do not determine the exponent either"
    return f"with E left free it is {span(fit.intervals['alpha'])} and E {span(fit.intervals['E'], 2)}{known}"


def held_sentence(held: HoldOut) -> str:
    """The hold-out test in words: miss, size of the miss against the step it had to predict, and what the test was worth."""
    text = (f"Held out, {', '.join(held.held)} is predicted within {100 * abs(held.relative_error):.2f} %, "
            f"{100 * held.gain_fraction:.0f} % of the gain from the next smaller size ({verdict(held)}).")  # fmt: skip
    if held.inside and held.fit and abs(held.relative_error) < held.fit.residual_sd / 2:
        text += f" So small a miss is luck: the law misses its own points by {100 * held.fit.residual_sd:.2f} %."
    if held.inside and held.width_fraction > WEAK:
        text += f" The interval is {held.width_fraction:.1f} times as wide as that gain: a weak test that only a large miss fails."
    return text


def verdict(held: HoldOut) -> str:
    """One phrase on a hold-out test."""
    if held.prediction is None:
        return f"not tested: {held.reason}"
    if held.inside:
        return "inside the interval"
    return "**outside, above the interval**" if held.measured > held.prediction.high else "**outside, below the interval**"


def assumed(result: StudyResult, metric: str) -> str:
    floor = result.floors[metric]
    return f"With an assumed irreducible part E = {floor:g}" if floor else "If nothing of it is irreducible (E = 0)"


def octaves(result: StudyResult) -> float:
    """Range of N as a power of two."""
    sizes = [run.size(result.size) for run in result.gate.kept]
    return math.log2(max(sizes) / min(sizes)) if sizes else 0.0


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def span(interval: tuple[float, float] | None, digits: int = 4) -> str:
    """low to high; an open end where the data do not bound it."""
    if not interval or any(map(math.isnan, interval)):
        return "n/a"
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(high) else f"{low:.{digits}f} or more (not bounded)"


def _measured(doc: Document, result: StudyResult, extra: Mapping[str, str]) -> None:
    doc.heading("What was measured")
    samples = sorted({run.eval_samples for run in result.records if run.eval_samples})
    count = " or ".join(f"{value:,}" for value in samples) or "no"
    doc.paragraph(
        f"Teacher-forced cross-entropy (nats a token) and top-1 error rate (a fraction) of the next-scale tokens on the validation split, "
        f"{count} samples, at the last step of each run. "
        "`last`: tokens of the last scale; `avg`: all tokens."
    )
    doc.bullets([
        "N counts attention, MLP and AdaLN matrices, 18 d C² (12 d C² with a shared AdaLN), as the paper does."
        if result.size == "params_paper"
        else f"N is `{result.size}`; the paper counts 18 d C².",
        "FLOPs are exact: block-causal pairs only, AdaLN once an image, training = 3 x forward.",
        *(f"{title}: {text}" for title, text in extra.items()),
    ])  # fmt: skip


def _runs(doc: Document, result: StudyResult) -> None:
    doc.heading("Runs")
    doc.table(
        ["run", "N", "all parameters", "images seen", "train FLOP", "L_last", "L_avg", "Err_last", "Err_avg", "time", "restarts", "gate"],
        [[run.name, short(run.params_paper), short(run.params_total), short(run.images), f"{run.flops_exact:.3g}",
          *(number(run.metric(metric)) for metric in METRICS), duration(run.seconds), run.restarts,
          "kept" if run in result.gate.kept else next(item.code for item in result.gate.excluded if item.record is run)]
         for run in result.records],
    )  # fmt: skip


def _gate(doc: Document, result: StudyResult) -> None:
    doc.heading("Health gate")
    doc.paragraph(f"{len(result.gate.kept)} of {len(result.records)} runs enter the fits.")
    if result.gate.excluded:
        rows = [[item.record.name, f"`{item.code}`", CODES[item.code], item.text] for item in result.gate.excluded]
        doc.table(["run", "code", "meaning", "detail"], rows)
    if any(item.code == "worse_than_smaller" for item in result.gate.excluded):
        doc.paragraph(
            "**A larger model was worse than a smaller one.** Leaving it out makes the law look better than the ladder: check its recipe."
        )


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
        "With the irreducible part E fitted (variable projection, bootstrap intervals). A fit that did not converge shows its reason only."
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


def _by_scale(doc: Document, result: StudyResult) -> None:
    if not any(fit.converged for fits in result.by_scale.values() for fit in fits):
        return
    doc.paragraph("The exponent of each scale by itself (power law, E = 0):")
    count = max(len(fits) for fits in result.by_scale.values())
    rows = [[f"{name} {what}", *((number(fit.params["alpha"]) if what == "α" else span(fit.intervals["alpha"])) if fit.converged else "none"
                                 for fit in fits)]
            for name, fits in result.by_scale.items() for what in ("α", "95 %")]  # fmt: skip
    doc.table(["", *(f"scale {k + 1}" for k in range(count))], rows)


def _floors(doc: Document, result: StudyResult) -> None:
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


def _isoflop(doc: Document, result: StudyResult, pictures: Mapping[str, Path]) -> None:
    if result.isoflop is None:
        return
    doc.heading("IsoFLOP curves")
    doc.paragraph("Runs of equal compute, average loss: a parabola over ln N for each budget, and how its minimum moves with compute.")
    doc.bullets(sentences(result.isoflop))
    if "isoflop" in pictures:
        doc.picture(pictures["isoflop"], CAPTIONS["isoflop"])


def _caveats(doc: Document, result: StudyResult) -> None:
    doc.heading("Read with care")
    kept = result.gate.kept
    noise = result.seed_sd["loss_avg"]
    seeds = (f"Seeds differ by {100 * noise:.3f} % (pooled, average loss); intervals use at least this." if math.isfinite(noise)
             else "Each size was trained once: run-to-run noise is not measured, only the scatter around the law.")  # fmt: skip
    budgets = {run.images for run in kept}
    data = "Runs differ in the images they saw; part of the trend with size may be a trend with data."
    if len(budgets) <= 1:
        same = short(next(iter(budgets), 0))
        data = f"All runs saw {same} images, repeats counted: this is a law at a fixed data budget, not of compute-optimal training."
    doc.bullets([
        seeds, data,
        f"The sizes span {octaves(result):.1f} octaves ({len({run.params_paper for run in kept})} sizes). "
        "Intervals hold if the form holds; extrapolating by more than one or two octaves trusts the form, not the data.",
        "Pearson's r is descriptive: on a short range it is near -1 for wrong laws and wrong floors too.",
        "Points on the compute frontier before the end of a run were taken at a learning rate that was not yet annealed.",
        "The recipe was not tuned at every size: if it suits one end of the ladder better, that is part of the exponent.",
    ])  # fmt: skip
