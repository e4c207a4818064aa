"""What a reader needs to trust a study: a checklist that fills itself, and what to read with care."""

from __future__ import annotations

import math

from var_scale.study.analyse import StudyResult
from var_scale.study.document import Document
from var_scale.study.plan import short
from var_scale.study.record import METRICS
from var_scale.study.words import WEAK, octaves

YES, NO, OPEN = "yes", "**no**", "not known"


def checklist(doc: Document, result: StudyResult) -> None:
    """After the checklist of (Mis)Fitting (Li et al. 2025): form, setup, data, fit."""
    doc.heading("Can it be trusted?")
    doc.table(["question", "", "detail"], [[question, answer, detail] for question, answer, detail in answers(result)])


def answers(result: StudyResult) -> list[tuple[str, str, str]]:
    """Question, yes, no or not known, and the detail, of the law of average loss."""
    kept, fit = result.gate.kept, result.fits["loss_avg", "power"]
    held, floor = result.holdouts["loss_avg", "power"], result.fits["loss_avg", "power_floor"]
    sizes = {run.params_paper for run in kept}
    left = [item for item in result.gate.excluded if item.code != "beaten_variant"]
    without = f", without {', '.join(item.record.name for item in left)}" if left else ""
    rows = [("Do all runs enter?", NO if left else YES, f"{len(result.records) - len(left)} of {len(result.records)}{without}")]
    rows.append(("Are there enough sizes, over a wide range?", YES if len(sizes) >= 5 and octaves(result) >= 4 else NO,
                 f"{len(sizes)} sizes over {octaves(result):.1f} octaves of N; 5 over 4 is the least"))  # fmt: skip
    if held.prediction is None:
        rows.append(("Did the law foresee the largest size?", OPEN, held.reason))
    else:
        where = "inside" if held.inside else "outside"
        detail = f"off by {100 * abs(held.relative_error):.2f} %, {where} the 95 % interval"
        rows.append(("Did the law foresee the largest size?", YES if held.inside else NO, detail))
        rows.append(("Could that test have failed?", YES if held.width_fraction <= WEAK else NO,
                     f"the interval is {held.width_fraction:.1f} times as wide as the step to the largest size"))  # fmt: skip
    p = fit.curvature()[1] if fit.converged else math.nan
    rows.append(("Do the points lie on a straight line?", OPEN if math.isnan(p) else NO if p < 0.05 else YES,
                 "too few sizes to tell" if math.isnan(p) else f"a quadratic term in ln N has p = {p:.2f}"))  # fmt: skip
    if floor.converged:
        low, high = floor.intervals["E"]
        known = high - low < 0.1 * min(floor.y)
        detail = f"E is between {low:.2f} and {high:.2f} by these points; the exponent goes with it"
        rows.append(("Is the irreducible part E known from the points?", YES if known else NO, detail))
    else:
        rows.append(("Is the irreducible part E known from the points?", NO, floor.reason))
    noise = result.seed_sd["loss_avg"]
    rows.append(("Is the noise between seeds measured?", YES if math.isfinite(noise) else NO,
                 f"{100 * noise:.3f} % of the average loss" if math.isfinite(noise) else "each size was trained once"))  # fmt: skip
    sem = evaluation_error(result)
    if math.isnan(sem):
        rows.append(("Is the evaluation large enough?", OPEN, "no standard errors were recorded"))
    else:
        detail = f"the choice of images moves the average loss by {100 * sem:.2f} % (standard error), of all runs together"
        rows.append(("Is the evaluation large enough?", YES if sem < 5e-3 else NO, detail))
    hashes = {run.data_hash for run in kept}
    rows.append(("Did all runs see the same data?", YES if len(hashes) == 1 and "" not in hashes else NO if len(hashes) > 1 else OPEN,
                 "by the checksums of training and validation shards"))  # fmt: skip
    rates = [run.final_lr_fraction for run in kept]
    rows.append(("Was the learning rate annealed everywhere?", YES if rates and max(rates) <= 0.1 else NO,
                 f"it ended at {max(rates):.2g} of its peak or below" if rates else "no healthy run"))  # fmt: skip
    bad = [f"{f.metric} {f.form}" for f in result.fits.values() if not f.converged]
    detail = f"not {', '.join(bad)}" if bad else "gradient, bounds and starts are audited"
    rows.append(("Did all fits converge?", NO if bad else YES, detail))
    rows.append(("Was the recipe tuned at every size?", OPEN, "if it suits one end of the ladder better, that is part of the exponent"))
    return rows


def evaluation_error(result: StudyResult) -> float:
    """Relative standard error of the average loss of the largest run from the choice of validation images; NaN where not measured."""
    known = [run.sems[METRICS.index("loss_avg")] / run.loss_avg for run in result.gate.kept if run.sems]
    return known[-1] if known else math.nan


def caveats(doc: Document, result: StudyResult) -> None:
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
        "All runs are measured on the same validation images: other images would move all of them together, which the intervals leave out.",
        f"The sizes span {octaves(result):.1f} octaves ({len({run.params_paper for run in kept})} sizes). "
        "Intervals hold if the form holds; extrapolating by more than one or two octaves trusts the form, not the data.",
        "Pearson's r is descriptive: on a short range it is near -1 for wrong laws and wrong floors too.",
        "Points on the compute frontier before the end of a run were taken at a learning rate that was not yet annealed.",
        "The recipe was not tuned at every size: if it suits one end of the ladder better, that is part of the exponent.",
    ])  # fmt: skip
