"""The health gate: which runs may enter a fit. Every exclusion has a code and a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from var_scale.records.record import METRICS, RunRecord, by_size

Code = Literal[
    "incomplete",
    "diverged",
    "failed",
    "non_finite",
    "not_annealed",
    "missing_evaluation",
    "worse_than_smaller",
    "data_differs",
    "training_values",
    "other_length",
    "beaten_variant",
    "by_hand",
]
MAX_FINAL_LR = 0.1
"""Largest last learning rate / peak: the loss of a run that is not annealed is not comparable."""
WORSE_TOLERANCE = 0.01
"""Relative excess over a smaller model's loss that is still accepted."""
LENGTH_TOLERANCE = 0.01
"""Relative difference of two numbers of images that are still one length."""
CODES: dict[Code, str] = {
    "by_hand": "excluded explicitly (study.exclude)",
    "incomplete": "the run has not reached its last step",
    "diverged": "the loss became non-finite or exploded and the run was stopped",
    "failed": "the run ended with an error",
    "missing_evaluation": "there is no evaluation at the last step",
    "non_finite": "a measured value is not a positive finite number",
    "not_annealed": f"the last learning rate is above {MAX_FINAL_LR:g} of the peak",
    "data_differs": "the run was trained on other data than the majority of the runs",
    "training_values": "its values are of the training data, and other runs have validation values",
    "worse_than_smaller": f"the average loss is more than {100 * WORSE_TOLERANCE:g} % above that "
    "of a smaller model that saw no more images: a bad recipe",
    "other_length": "all sizes have runs of another length; this run is in the frontier and in "
    "surfaces, but not in the laws of N, which compare sizes after equal data",
    "beaten_variant": "another point of the study's grid is better at this size and seed; this run "
    "is in the frontier and in surfaces, but not in the laws of N",
}
NEEDED = ("missing_evaluation", "non_finite")
"""Codes that `keep` cannot overrule, because there is no value to fit."""
DESIGNED = ("other_length", "beaten_variant")
"""Codes of healthy runs that a study planned: points of its grid that the laws of N leave out."""


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

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the kept runs whose values are of the training data."""
        return tuple(run.name for run in self.kept if run.split != "validation")


def check_run(record: RunRecord, metrics: Sequence[str] = METRICS) -> tuple[Code, str] | None:
    """The first problem of a run by itself, with the values of `metrics`; None if it is healthy."""
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
            f"the learning rate ended at {record.final_lr_fraction:g} of its peak; at most "
            f"{MAX_FINAL_LR:g} is comparable",
        )
    return None


def gate(
    records: Sequence[RunRecord],
    exclude: Mapping[str, str] | None = None,
    keep: Mapping[str, str] | None = None,
    metrics: Sequence[str] = METRICS,
) -> GateResult:
    """Keep healthy, comparable runs.

    The order of the checks is: each run by itself, training values beside validation values, the
    data of the majority, and whether a run is worse than a smaller one.

    Args:
        exclude: names of runs to exclude, with the reason.
        keep: names of runs to keep, with the reason; one without a value to fit is still excluded.
        metrics: those that a run must have.
    """
    exclude, keep = exclude or {}, keep or {}
    excluded: list[Exclusion] = []
    healthy: list[RunRecord] = []
    for record in by_size(records):
        problem = check_run(record, metrics)
        kept_anyway = (
            record.name in keep
            and (not problem or problem[0] not in NEEDED)
            and math.isfinite(record.loss_avg)
        )
        if record.name in exclude:
            excluded.append(Exclusion(record, "by_hand", exclude[record.name]))
        elif problem and not kept_anyway:
            excluded.append(Exclusion(record, *problem))
        else:
            healthy.append(record)
    if any(run.split == "validation" for run in healthy):
        for record in healthy:
            if record.split != "validation" and record.name not in keep:
                text = "its values are of the training data, and other runs have validation values"
                excluded.append(Exclusion(record, "training_values", text))
        healthy = [run for run in healthy if run.split == "validation" or run.name in keep]
    if healthy:
        common = Counter(record.data_hash for record in healthy).most_common(1)[0][0]
        other = [run for run in healthy if run.data_hash != common and run.name not in keep]
        for record in other:
            text = f"data {_brief(record.data_hash)}, most runs have {_brief(common)}"
            excluded.append(Exclusion(record, "data_differs", text))
        healthy = [run for run in healthy if run.data_hash == common or run.name in keep]
    kept: list[RunRecord] = []
    for record in healthy:
        smaller = [
            run
            for run in kept
            if run.params_paper < record.params_paper and run.images <= record.images
        ]
        best = min(smaller, key=lambda run: run.loss_avg, default=None)
        worse = best and record.loss_avg > best.loss_avg * (1 + WORSE_TOLERANCE)
        if best and worse and record.name not in keep:
            text = (
                f"loss_avg {record.loss_avg:.4f} is above {best.loss_avg:.4f} of the smaller "
                f"{best.name}"
            )
            excluded.append(Exclusion(record, "worse_than_smaller", text))
        else:
            kept.append(record)
    return GateResult(tuple(kept), tuple(excluded))


def _brief(data_hash: str) -> str:
    """train:validation, eight characters each."""
    return ":".join(part[:8] for part in data_hash.split(":"))


def best_of_variants(
    kept: Sequence[RunRecord],
) -> tuple[tuple[RunRecord, ...], tuple[Exclusion, ...]]:
    """The runs of a law of N: one point of a study's grid for each size and seed.

    A law of N compares sizes after equal data, so where the runs have several lengths, the longest
    one that every size has is taken. Of the points of a grid that remain, the one with the smallest
    average loss is taken. If no length is common to all sizes, each size and seed has its best run.
    A frontier and a surface take all runs.

    Returns:
        The chosen runs, and the others with the reason.
    """
    lengths: dict[int, set[int]] = {}
    for run in kept:
        lengths.setdefault(run.params_paper, set()).add(run.images)
    shared = [
        length
        for length in set().union(*lengths.values())
        if all(any(_same_length(length, other) for other in known) for known in lengths.values())
    ]
    length = max(shared, default=None)
    best: dict[tuple[int, int], RunRecord] = {}
    for run in kept:
        key = (run.params_paper, run.seed)
        if (length is None or _same_length(run.images, length)) and (
            key not in best or run.loss_avg < best[key].loss_avg
        ):
            best[key] = run
    chosen, left_out = [], []
    for run in kept:
        winner = best.get((run.params_paper, run.seed))
        if run is winner:
            chosen.append(run)
        elif winner is None or not (length is None or _same_length(run.images, length)):
            text = f"{run.images:,} images; every size has a run of {length:,} images"
            left_out.append(Exclusion(run, "other_length", text))
        else:
            text = f"loss_avg {run.loss_avg:.4f}, {winner.name} has {winner.loss_avg:.4f}"
            left_out.append(Exclusion(run, "beaten_variant", text))
    return tuple(chosen), tuple(left_out)


def _same_length(one: int, other: int) -> bool:
    """Whether two numbers of images count as one length. They are whole batches, so runs of one
    length with other batch sizes differ by a part of a batch."""
    return abs(one - other) <= LENGTH_TOLERANCE * max(one, other)
