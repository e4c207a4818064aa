"""The report of a study: report.md, report.html (self-contained), runs.csv, fit.json and the pictures, in STUDY/report/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from var_scale.files import write_json, write_text
from var_scale.progress import duration
from var_scale.study.analyse import StudyResult
from var_scale.study.document import Document
from var_scale.study.gate import CODES
from var_scale.study.plan import short
from var_scale.study.plots import write_plots
from var_scale.study.record import METRICS, write_runs_csv
from var_scale.study.report_laws import compute_and_data, exponents_by_scale, laws_of_size, tests
from var_scale.study.report_trust import caveats, checklist
from var_scale.study.words import assumed, free_floor, held_sentence, number, octaves

QUESTION = ("How does a VAR image model get better as it gets bigger: which power law do loss and error rate follow, does it foresee a "
            "larger model, and what should be trained next?")  # fmt: skip
CAPTIONS = {
    "residuals": "Residuals of the fits on all sizes. A bend means that the form is wrong over this range.",
    "per_scale": "Loss and error rate of each scale.",
    "growth": "The same classes and random numbers from every size (down) at several points of its training (across).",
    "quality": "Distance of the models' samples from validation images, against average loss and size (`var-scale study quality`).",
    "samples": "Samples of the largest healthy model, a row a class.",
    "reconstructions": "Validation images above what the tokenizer makes of them: the best that any model on these tokens can draw.",
}  # fmt: skip


def write_report(
    study_dir: Path, result: StudyResult, extra: Mapping[str, str] | None = None, shown: Mapping[str, Path] | None = None,
    plan: Plan | None = None,
) -> Path:  # fmt: skip
    """Write STUDY/report/ and return the path of report.html. `extra` adds lines to "What was measured" (title: text), `shown`
    PNG files that exist already (growth, samples, reconstructions), `plan` what was planned and what comes next."""
    folder = Path(study_dir) / "report"
    for left_over in folder.glob(".*.tmp"):  # of a report that was killed
        left_over.unlink()
    pictures = write_plots(result, folder) | dict(shown or {})
    document = build_document(Path(study_dir).resolve().name, result, pictures, extra or {}, plan)
    write_runs_csv(result.records, folder / "runs.csv")
    write_json(folder / "fit.json", result.to_json())
    write_text(folder / "report.md", document.markdown(folder))
    write_text(folder / "report.html", document.html())
    return folder / "report.html"


@dataclass(frozen=True)
class Plan:
    """Of a study: what its runs were expected to take, by name (seconds, FLOPs), and lines on what to run next."""

    expected: Mapping[str, tuple[float, float]]
    following: Sequence[str]


def build_document(name: str, result: StudyResult, pictures: Mapping[str, Path], extra: Mapping[str, str], plan: Plan | None) -> Document:
    """The report as a document, in the order a reader asks: question, answer, trust, measurement, runs, laws, test, plan, pictures."""
    doc = Document(f"Scaling study {name}")
    doc.paragraph(QUESTION)
    doc.paragraph(headline(result))
    checklist(doc, result)
    _measured(doc, result, extra)
    _runs(doc, result)
    _gate(doc, result)
    laws_of_size(doc, result, pictures)
    tests(doc, result)
    compute_and_data(doc, result, pictures)
    if plan:
        _plan(doc, result, plan)
    titles = {"residuals": "Residuals", "per_scale": "Scales", "quality": "Sample quality", "growth": "Samples by size and compute",
              "samples": "Samples", "reconstructions": "Tokenizer"}  # fmt: skip
    for picture, title in titles.items():
        if picture in pictures:
            doc.heading(title)
            doc.picture(pictures[picture], CAPTIONS[picture] + (_first_scale(result) if picture == "per_scale" else ""))
            if picture == "per_scale":
                exponents_by_scale(doc, result)
    caveats(doc, result)
    return doc


def _plan(doc: Document, result: StudyResult, plan: Plan) -> None:
    doc.heading("The plan, and what comes next")
    rows = []
    for run in result.records:
        if run.name in plan.expected:
            seconds, flops = plan.expected[run.name]
            rows.append([run.name, f"{flops:.3g}", f"{run.flops_exact:.3g}", duration(seconds), duration(run.seconds)])
    if rows:
        doc.paragraph("Expected before the start, and what it took:")
        doc.table(["run", "planned FLOP", "FLOP", "planned time", "time"], rows)
    if plan.following:
        doc.bullets(plan.following)


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
