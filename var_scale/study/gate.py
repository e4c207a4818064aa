"""The health gate: which runs may enter a fit. Every exclusion has a code and a sentence, and is printed in the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from var_scale.study.record import METRICS, RunRecord

Code = Literal[
    "incomplete", "diverged", "failed", "non_finite", "not_annealed", "missing_evaluation", "worse_than_smaller", "data_differs",
    "beaten_variant", "by_hand",
]  # fmt: skip
MAX_FINAL_LR = 0.1
WORSE_TOLERANCE = 0.01
CODES: dict[Code, str] = {
    "by_hand": "left out by a person (study.exclude)",
    "incomplete": "the run has not reached its last step",
    "diverged": "the loss became non-finite or exploded and the run was stopped",
    "failed": "the run ended with an error",
    "missing_evaluation": "no evaluation at the last step",
    "non_finite": "a measured value is not a positive finite number",
    "not_annealed": f"the last learning rate is above {MAX_FINAL_LR:g} of the peak",
    "data_differs": "trained on other data than the majority of the runs",
    "worse_than_smaller": f"average loss more than {100 * WORSE_TOLERANCE:g} % above a smaller model's that saw no more images: a bad "
    "recipe",
    "beaten_variant": "another point of the study's grid is better at this size and seed; it is in the frontier, not in the laws of N",
}


@dataclass(frozen=True)
class Exclusion:
    """A run that does not enter the fits, and why."""

    record: RunRecord
    code: Code
    text: str


@dataclass(frozen=True)
class GateResult:
    """Runs kept for fitting, smallest first, and runs excluded."""

    kept: tuple[RunRecord, ...]
    excluded: tuple[Exclusion, ...]


def check_run(record: RunRecord, metrics: Sequence[str] = METRICS) -> tuple[Code, str] | None:
    """The first thing wrong with a run by itself, of its values those of `metrics`; None for a healthy run."""
    because = f": {record.reason}" if record.reason else ""
    if record.state == "diverged":
        return "diverged", f"diverged{because}"
    if record.state == "failed":
        return "failed", f"failed{because}"
    if record.state != "complete":
        return "incomplete", f"state is {record.state}{because}"
    values = [record.metric(name) for name in metrics]
    if record.eval_samples <= 0 or all(math.isnan(value) for value in values):
        return "missing_evaluation", "there is no evaluation at the last step"
    for name, value in zip(metrics, values, strict=True):
        if not math.isfinite(value) or value <= 0:
            return "non_finite", f"{name} is {value:g}"
    if not record.final_lr_fraction <= MAX_FINAL_LR:
        return (
            "not_annealed",
            f"the learning rate ended at {record.final_lr_fraction:g} of its peak; at most {MAX_FINAL_LR:g} is comparable",
        )
    return None


def _brief(data_hash: str) -> str:
    """train:validation, eight characters each."""
    return ":".join(part[:8] for part in data_hash.split(":"))


NEEDED = ("missing_evaluation", "non_finite")
"""codes that nobody can overrule: there is no value to fit"""


def gate(
    records: Sequence[RunRecord], worse_tolerance: float = WORSE_TOLERANCE, exclude: Mapping[str, str] | None = None,
    keep: Mapping[str, str] | None = None, metrics: Sequence[str] = METRICS,
) -> GateResult:  # fmt: skip
    """Keep healthy, comparable runs. Order of checks: each run by itself, the data of the majority, worse than a smaller one. A person's
    word is stronger: runs named in `exclude` go, those in `keep` stay unless they have no value to fit. `metrics`: those that a run
    must have."""
    exclude, keep = exclude or {}, keep or {}
    excluded: list[Exclusion] = []
    healthy: list[RunRecord] = []
    for record in sorted(records, key=lambda run: (run.params_paper, run.seed, run.name)):
        if record.name in exclude:
            excluded.append(Exclusion(record, "by_hand", exclude[record.name]))
        elif record.name in keep and (check_run(record, metrics) or ("", ""))[0] not in NEEDED and math.isfinite(record.loss_avg):
            healthy.append(record)
        elif problem := check_run(record, metrics):
            excluded.append(Exclusion(record, *problem))
        else:
            healthy.append(record)
    if healthy:
        common = Counter(record.data_hash for record in healthy).most_common(1)[0][0]
        for record in [run for run in healthy if run.data_hash != common and run.name not in keep]:
            excluded.append(Exclusion(record, "data_differs", f"data {_brief(record.data_hash)}, most runs have {_brief(common)}"))
        healthy = [run for run in healthy if run.data_hash == common or run.name in keep]
    kept: list[RunRecord] = []
    for record in healthy:
        smaller = [run for run in kept if run.params_paper < record.params_paper and run.images <= record.images]
        best = min(smaller, key=lambda run: run.loss_avg, default=None)
        if best and record.name not in keep and record.loss_avg > best.loss_avg * (1 + worse_tolerance):
            text = f"loss_avg {record.loss_avg:.4f} is above {best.loss_avg:.4f} of the smaller {best.name}"
            excluded.append(Exclusion(record, "worse_than_smaller", text))
        else:
            kept.append(record)
    return GateResult(tuple(kept), tuple(excluded))


def best_of_variants(kept: Sequence[RunRecord]) -> tuple[tuple[RunRecord, ...], tuple[Exclusion, ...]]:
    """Of runs of one size and seed, the points of a grid, the one with the smallest average loss, and the others with the reason. A law
    of N compares sizes at their best; a frontier takes all."""
    best: dict[tuple[int, int], RunRecord] = {}
    for run in kept:
        key = (run.params_paper, run.seed)
        if key not in best or run.loss_avg < best[key].loss_avg:
            best[key] = run
    beaten = [Exclusion(run, "beaten_variant", f"loss_avg {run.loss_avg:.4f}, {winner.name} has {winner.loss_avg:.4f}")
              for run in kept if (winner := best[run.params_paper, run.seed]) is not run]  # fmt: skip
    return tuple(run for run in kept if run is best[run.params_paper, run.seed]), tuple(beaten)
