"""The compute frontier: the best loss at each compute over all runs, and its power law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var_scale.study.bootstrap import Indices, bootstrap_interval
from var_scale.study.laws import LawFit, plain
from var_scale.study.power import NOISE_FLOOR, fit_law
from var_scale.study.record import RunRecord

RULE = (
    "all evaluations of all kept runs, sorted by training FLOPs; a point is on the frontier when its value is below "
    "every value at equal or less compute; the fit uses frontier points at or above the compute at which the smallest run ended"
)
BOOTSTRAP_DRAWS = 200


@dataclass(frozen=True)
class FrontierPoint:
    """One evaluation on the frontier."""

    run: str
    flops: float
    value: float


@dataclass(frozen=True)
class Frontier:
    """Frontier of one metric. `fit` is a power law in training FLOPs (variable C, unit 1e15)."""

    metric: str
    points: tuple[FrontierPoint, ...]
    fit: LawFit
    alpha_interval: tuple[float, float] | None
    """95 % bootstrap by run: points of one run are not independent, so the fit's own interval is too narrow"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        points = [[point.run, point.flops, point.value] for point in self.points]
        value: dict[str, Any] = plain({"metric": self.metric, "rule": RULE, "points": points, "alpha_interval": self.alpha_interval})
        return value | {"fit": self.fit.to_json()}


def evaluations(records: Sequence[RunRecord], metric: str) -> list[FrontierPoint]:
    """All evaluations of the runs; a run without a curve counts with its final value."""
    points = []
    for record in records:
        curve = [(point.flops_exact, getattr(point, metric)) for point in record.curve] or [(record.flops_exact, record.metric(metric))]
        points += [FrontierPoint(record.name, float(flops), float(value)) for flops, value in curve if flops > 0 and value > 0]
    return points


def pareto(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Running minimum in compute."""
    best, front = float("inf"), []
    for point in sorted(points, key=lambda p: (p.flops, p.value)):
        if point.value < best:
            best = point.value
            front.append(point)
    return tuple(front)


def fit_frontier(records: Sequence[RunRecord], metric: str = "loss_avg", floor: float = 0.0, seed: int = 0) -> Frontier:
    """Frontier and its law; `seed` is the bootstrap's."""
    front = pareto(evaluations(records, metric))
    fit = _fit(front, records, metric, floor)
    if not fit.converged:
        return Frontier(metric, front, fit, None)

    def alpha(index: Indices) -> float | None:
        chosen = [records[int(i)] for i in index]
        again = _fit(pareto(evaluations(chosen, metric)), chosen, metric, floor)
        return again.params["alpha"] if again.converged else None

    return Frontier(metric, front, fit, bootstrap_interval(alpha, len(records), seed, BOOTSTRAP_DRAWS))


def _fit(front: Sequence[FrontierPoint], records: Sequence[RunRecord], metric: str, floor: float) -> LawFit:
    start = min((record.flops_exact for record in records), default=0)
    used = [point for point in front if point.flops >= start]
    names = [f"{point.run}@{point.flops:.4g}" for point in used]
    return fit_law("power", [p.flops for p in used], [p.value for p in used], metric=metric, variable="C", floor=floor, rows=names,
                   noise_floor=NOISE_FLOOR)  # fmt: skip
