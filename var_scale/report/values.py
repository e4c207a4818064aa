"""The numbers, tables and verdicts that the report's template prints, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_scale.laws.adequacy import SIGNIFICANT
from var_scale.laws.forms import SURFACES, Form
from var_scale.laws.noise import noise_trend
from var_scale.progress import duration, short
from var_scale.records.analyse import StudyResult
from var_scale.records.gate import CODES, DESIGNED, MAX_FINAL_LR
from var_scale.records.holdout import HoldOut
from var_scale.records.record import METRICS, RunRecord

YES, NO, OPEN = "yes", "**no**", "not known"
WEAK = 2.0
"""A hold-out test is weak if its interval is wider than this many steps of the ladder."""


@dataclass(frozen=True)
class Plan:
    """What a study planned, and what it should run next.

    Args:
        expected: seconds and FLOPs that each run was expected to take, by the run's name.
        following: lines on what to run next.
    """

    expected: Mapping[str, tuple[float, float]]
    following: Sequence[str]


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` decimals; n/a if it is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def span(interval: tuple[float, float] | None, digits: int = 4) -> str:
    """An interval as "low to high", with an open end where the data do not bound it."""
    if not interval or any(map(math.isnan, interval)):
        return "n/a"
    low, high = interval
    if math.isinf(high):
        return f"{low:.{digits}f} or more (not bounded above)"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def percent(share: float, digits: int = 2) -> str:
    """A fraction in percent."""
    return f"{100 * share:.{digits}f} %"


def verdict(held: HoldOut) -> str:
    """The outcome of a hold-out test."""
    if held.prediction is None:
        return f"not tested: {held.reason}"
    if held.inside:
        return "inside the interval"
    side = "above" if held.measured > held.prediction.high else "below"
    return f"**outside, {side} the interval**"


def octaves(result: StudyResult) -> float:
    """Range of N of the kept runs as a power of two: log2 of the largest over the smallest."""
    sizes = [run.n for run in result.gate.kept]
    return math.log2(max(sizes) / min(sizes)) if sizes else 0.0


def study_values(result: StudyResult, plan: Plan | None) -> dict[str, Any]:
    """Everything except the tables of laws: headline, checklist, runs, gate, plan."""
    kept, excluded = result.gate.kept, result.gate.excluded
    fit, free = result.law("loss_avg"), result.fits["loss_avg", "power_floor"]
    noise, error = result.seed_sd["loss_avg"], evaluation_error(result)
    budgets = {run.images for run in kept}
    counts = sorted({run.eval_samples for run in result.records if run.eval_samples})
    return {
        "octaves": octaves(result),
        "counted": result.counted,
        "sizes": len({run.params_paper for run in kept}),
        "kept": len(kept),
        "total": len(result.records),
        "law": {
            "converged": fit.converged,
            "reason": fit.reason,
            "form": fit.form,
            "equation": fit.equation,
            "floor": result.floors["loss_avg"],
            "alpha": fit.params.get("alpha", math.nan),
            "interval": fit.intervals.get("alpha"),
            "rejected": result.rejected("loss_avg"),
        },
        "test": form_test(result, "power"),
        "floor_test": form_test(result, "power_floor"),
        "free": {
            "converged": free.converged,
            "reason": free.reason,
            "alpha": free.intervals.get("alpha"),
            "floor": free.intervals.get("E"),
            "known": free.converged
            and (free.intervals["E"][0] > 0 or free.intervals["E"][1] < 0.5 * min(free.y)),
        },
        "surface": surface_floor(result),
        "held": held_out(result.holdout("loss_avg")),
        "checks": checks(result),
        "missing": [item.record.name for item in missing(result)],
        "rates": learning_rates(result),
        "seed_noise": percent(noise, 3) if math.isfinite(noise) else "",
        "evaluation_error": percent(error) if math.isfinite(error) else "",
        "last_rate": max((run.final_lr_fraction for run in kept), default=None),
        "failed_fits": [f"{f.metric} {f.form}" for f in result.fits.values() if not f.converged],
        "samples": " or ".join(f"{count:,}" for count in counts) or "no",
        "images": short(next(iter(budgets), 0)) if len(budgets) <= 1 else "",
        "noise": noise_trend(fit),
        "first_scale": first_scale(result),
        "runs": run_rows(result),
        "excluded": [[item.record.name, f"`{item.code}`", item.text] for item in excluded],
        "codes": [(f"`{code}`", CODES[code]) for code in dict.fromkeys(e.code for e in excluded)],
        "planned": len(result.healthy) - len(kept),
        "worse": any(item.code == "worse_than_smaller" for item in excluded),
        "plan": plan and {"rows": plan_rows(result, plan), "following": plan.following},
    }


def held_out(held: HoldOut) -> dict[str, Any]:
    """The hold-out test of the average loss; `reason` is empty if it took place."""
    if held.prediction is None:
        return {"reason": held.reason, "step": "unknown"}
    scatter = held.fit.residual_sd if held.fit else math.nan
    return {
        "reason": "",
        "form": "surface of size and data" if held.form in SURFACES else "law",
        "runs": ", ".join(held.held),
        "miss": percent(abs(held.relative_error)),
        "step": percent(held.step / held.measured),
        "share": percent(held.gain_fraction, 0),
        "verdict": verdict(held),
        "side": "inside" if held.inside else "outside",
        # A miss far below the scatter of the points around their own law proves nothing more.
        "lucky": held.inside and abs(held.relative_error) < scatter / 2,
        "scatter": percent(scatter),
        "weak": held.inside and held.width_fraction > WEAK,
        "width": f"{held.width_fraction:.1f}",
    }


def missing(result: StudyResult) -> list[Any]:
    """Exclusions that the study did not plan: all but points of its grid."""
    return [item for item in result.gate.excluded if item.code not in DESIGNED]


def checks(result: StudyResult) -> dict[str, str]:
    """Yes, no or not known for each question of the checklist, about the law of the average loss.

    The questions follow the checklist of (Mis)Fitting (Li et al. 2025): form, setup, data, fit.
    """
    kept, held = result.gate.kept, result.holdout("loss_avg")
    sizes = {run.params_paper for run in kept}
    test = result.adequacy.get(("loss_avg", result.leading("loss_avg")))
    error, step = evaluation_error(result), held.step / held.measured
    hashes = {run.data_hash for run in kept}
    low, high = result.surface.intervals["E"] if result.surface else (0.0, math.inf)
    rates = learning_rates(result)

    def answer(good: bool, known: bool = True) -> str:
        return OPEN if not known else YES if good else NO

    return {
        "runs": answer(not missing(result)),
        "sizes": answer(len(sizes) >= 5 and octaves(result) >= 4),
        "foreseen": answer(
            held.inside and held.gain_fraction < 1 and not result.rejected("loss_avg"),
            held.prediction is not None,
        ),
        "failable": answer(held.width_fraction <= WEAK, held.prediction is not None),
        "form": answer(not (test and test.rejected), test is not None and form_tested(result)),
        "floor": answer(high - low < 0.1 * min((run.loss_avg for run in kept), default=0.0)),
        "tuned": answer(not (rates["edge"] or rates["missing"] or rates["other"]), rates["known"]),
        "seeds": answer(math.isfinite(result.seed_sd["loss_avg"])),
        "evaluation": answer(error < step / 4, not math.isnan(error)),
        "data": answer(len(hashes) == 1, bool(hashes - {""})),
        "annealed": answer(
            bool(kept) and max(run.final_lr_fraction for run in kept) <= MAX_FINAL_LR
        ),
        "converged": answer(all(fit.converged for fit in result.fits.values())),
    }


def form_tested(result: StudyResult) -> bool:
    """Whether a test of the leading law of the average loss could have found it wrong.

    Of a power law: whether it would have noticed a floor. A law with a fitted floor leads because
    that test noticed one; it is judged against the noise between seeds.
    """
    leading = result.leading("loss_avg")
    test = result.adequacy[("loss_avg", leading)]
    if leading == "power" and not test.rejected:
        return test.decided
    return math.isfinite(test.p_noise)


def form_test(result: StudyResult, form: Form) -> dict[str, str] | None:
    """What the tests of one law of the average loss found; None if there is none."""
    test = result.adequacy.get(("loss_avg", form))
    if test is None:
        return None
    return {
        "bend": f"{test.p_bend:.2g}" if math.isfinite(test.p_bend) else "",
        # After a bend was found, the scatter about the straight line is no noise.
        "power": percent(test.power, 0) if test.p_bend >= SIGNIFICANT else "",
        "noise": f"{test.p_noise:.2g}" if math.isfinite(test.p_noise) else "",
    }


def surface_floor(result: StudyResult) -> str:
    """The interval of E of the surface of size and data; empty without one."""
    return span(result.surface.intervals["E"], 3) if result.surface else ""


def learning_rates(result: StudyResult) -> dict[str, Any]:
    """For which sizes at least three peak learning rates were tried, in a grid of the study or in
    the sweep that it names.

    Returns:
        `known`: whether the rates are recorded; `missing`: names of the sizes without a grid;
        `edge`: names of those whose best rate is the smallest or the largest of its grid; `other`:
        names of those that were trained nearer to another rate of the sweep than to its best.
    """
    missing, edge, other = list[str](), list[str](), list[str]()
    runs = result.healthy
    tried = [*(result.sweep or runs)]
    for n in sorted({run.params_paper for run in runs}):
        name = f"d{next(run.depth for run in runs if run.params_paper == n)}"
        trained = max(run.images for run in runs if run.params_paper == n)
        losses = _loss_by_rate(
            run for run in tried if (run.params_paper, run.images) == (n, trained)
        )
        rates = sorted(losses)
        if len(rates) < 3:
            missing.append(name)
            continue
        best = min(rates, key=losses.__getitem__)
        if best in (rates[0], rates[-1]):
            edge.append(name)
        elif result.sweep and any(
            min(rates, key=lambda rate: abs(math.log(rate / run.peak_lr))) != best
            for run in runs
            if run.params_paper == n
        ):
            other.append(name)
    known = bool(runs) and all(run.peak_lr > 0 for run in [*runs, *tried])
    return {"known": known, "missing": missing, "edge": edge, "other": other}


def _loss_by_rate(runs: Iterable[RunRecord]) -> dict[float, float]:
    """The average loss of each peak learning rate: of the best variant, the mean over seeds."""
    found = dict[float, dict[int, float]]()
    for run in runs:
        of_rate = found.setdefault(run.peak_lr, {})
        of_rate[run.seed] = min(run.loss_avg, of_rate.get(run.seed, math.inf))
    return {rate: sum(seeds.values()) / len(seeds) for rate, seeds in found.items()}


def evaluation_error(result: StudyResult) -> float:
    """Standard error, from the choice of validation images, of the improvement of the largest size
    over the next smaller one, as a share of the largest's average loss; NaN if it was not measured.

    Both runs saw the same images, so it is that of the differences between parts of the images.
    """
    held = result.holdout("loss_avg").held
    last = [run for run in result.healthy if run.name in held and run.blocks]
    rest = [
        run
        for run in result.healthy
        if last and run.images == last[-1].images and run.params_paper < last[-1].params_paper
    ]
    if not last or not rest:
        return math.nan
    large, small = np.array(last[-1].blocks), np.array(rest[-1].blocks)
    if len(large) != len(small) or last[-1].data_hash != rest[-1].data_hash or len(large) < 8:
        return math.nan
    return float((large - small).std(ddof=1) / math.sqrt(len(large)) / last[-1].loss_avg)


def first_scale(result: StudyResult) -> dict[str, str] | None:
    """The sampling error of the noisiest point of the picture of scales, the first scale's error
    rate: one token per image, so binomial."""
    run = next((run for run in result.gate.kept if run.err_per_scale), None)
    if run is None or run.eval_samples < 1:
        return None
    error = run.err_per_scale[0]
    deviation = 100 * math.sqrt(error * (1 - error) / run.eval_samples)
    return {"samples": f"{run.eval_samples:,}", "error": f"{deviation:.1f}"}


def run_rows(result: StudyResult) -> list[list[object]]:
    """The table of runs."""
    codes = {id(item.record): item.code for item in result.gate.excluded}
    return [
        [
            run.name,
            short(run.n),
            short(run.params_paper if run.counted == "params_total" else run.params_total),
            short(run.images),
            f"{run.flops_exact:.3g}",
            *(number(run.metric(metric)) for metric in METRICS),
            duration(run.seconds),
            run.restarts,
            codes.get(id(run), "kept"),
        ]
        for run in result.records
    ]


def plan_rows(result: StudyResult, plan: Plan) -> list[list[str]]:
    """Planned and measured compute and time of every run."""
    rows = []
    for run in result.records:
        if run.name in plan.expected:
            seconds, flops = plan.expected[run.name]
            compute = [f"{flops:.3g}", f"{run.flops_exact:.3g}"]
            rows.append([run.name, *compute, duration(seconds), duration(run.seconds)])
    return rows
