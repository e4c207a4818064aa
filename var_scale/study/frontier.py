"""The frontier: the best value at each amount of compute, or of data, over all runs; its power law, and the size that holds it.

Against compute this is the paper's C_min and Hoffmann et al.'s approach 1 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from var_scale.study.bootstrap import Indices, bootstrap_interval
from var_scale.study.laws import LawFit, plain
from var_scale.study.power import NOISE_FLOOR, fit_law
from var_scale.study.record import RunRecord

Along = Literal["C", "tokens"]
RULE = (
    "all evaluations of all kept runs, sorted by training FLOPs; a point is on the frontier when its value is below "
    "every value at equal or less compute; the fit uses frontier points at or above the compute at which the smallest run ended"
)
BOOTSTRAP_DRAWS = 200
STEPS = 60


@dataclass(frozen=True)
class FrontierPoint:
    """One evaluation: at x training FLOPs, or tokens, of a run of n parameters."""

    run: str
    x: float
    value: float
    n: int = 0


@dataclass(frozen=True)
class Frontier:
    """Frontier of one metric along compute (`fit` in training FLOPs, unit 1e15) or tokens."""

    metric: str
    along: Along
    points: tuple[FrontierPoint, ...]
    fit: LawFit
    alpha_interval: tuple[float, float] | None
    """95 % bootstrap by run: points of one run are not independent, so the fit's own interval is too narrow"""
    size_exponent: float
    """a of N ~ C^a, N the size that holds the frontier at C; NaN along tokens or where one size holds all of it"""
    size_interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        value: dict[str, Any] = plain({
            "metric": self.metric, "along": self.along, "rule": RULE, "points": [[p.run, p.x, p.value] for p in self.points],
            "alpha_interval": self.alpha_interval, "size_exponent": self.size_exponent, "size_interval": self.size_interval,
        })  # fmt: skip
        return value | {"fit": self.fit.to_json()}


def evaluations(records: Sequence[RunRecord], metric: str, along: Along = "C") -> list[FrontierPoint]:
    """All evaluations of the runs; a run without a curve counts with its final value."""
    points = []
    for record in records:
        curve = [(point.flops_exact, getattr(point, metric)) for point in record.curve] or [(record.flops_exact, record.metric(metric))]
        points += [FrontierPoint(record.name, float(flops) if along == "C" else float(round(record.tokens * flops / record.flops_exact)),
                                 float(value), record.params_paper)
                   for flops, value in curve if flops > 0 and value > 0]  # fmt: skip
    return points


def pareto(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Running minimum in x."""
    best, front = float("inf"), []
    for point in sorted(points, key=lambda p: (p.x, p.value)):
        if point.value < best:
            best = point.value
            front.append(point)
    return tuple(front)


def fit_frontier(records: Sequence[RunRecord], metric: str = "loss_avg", floor: float = 0.0, seed: int = 0, along: Along = "C") -> Frontier:
    """Frontier and its law; `seed` is the bootstrap's."""
    front = pareto(evaluations(records, metric, along))
    fit, size = _fit(front, records, metric, floor, along), _size_exponent(front, records) if along == "C" else math.nan
    if not fit.converged:
        return Frontier(metric, along, front, fit, None, size, None)

    def again(index: Indices) -> tuple[tuple[FrontierPoint, ...], list[RunRecord]]:
        chosen = [records[int(i)] for i in index]
        return pareto(evaluations(chosen, metric, along)), chosen

    def alpha(index: Indices) -> float | None:
        redone = _fit(*again(index), metric, floor, along)
        return redone.params["alpha"] if redone.converged else None

    def exponent(index: Indices) -> float | None:
        value = _size_exponent(*again(index))
        return value if math.isfinite(value) else None

    return Frontier(metric, along, front, fit, bootstrap_interval(alpha, len(records), seed, BOOTSTRAP_DRAWS), size,
                    bootstrap_interval(exponent, len(records), seed, BOOTSTRAP_DRAWS) if math.isfinite(size) else None)  # fmt: skip


def frontier_law(records: Sequence[RunRecord], metric: str, floor: float) -> LawFit:
    """The frontier's power law alone, along compute."""
    return _fit(pareto(evaluations(records, metric)), records, metric, floor, "C")


def _start(records: Sequence[RunRecord], along: Along) -> float:
    """Where the smallest run ended."""
    return float(min((record.flops_exact if along == "C" else record.tokens for record in records), default=0))


def _fit(front: Sequence[FrontierPoint], records: Sequence[RunRecord], metric: str, floor: float, along: Along) -> LawFit:
    start = _start(records, along) if along == "C" else 0.0
    used = [point for point in front if point.x >= start]
    names = [f"{point.run}@{point.x:.4g}" for point in used]
    return fit_law("power", [p.x for p in used], [p.value for p in used], metric=metric, variable=along, floor=floor, rows=names,
                   noise_floor=NOISE_FLOOR)  # fmt: skip


def _size_exponent(front: Sequence[FrontierPoint], records: Sequence[RunRecord]) -> float:
    """Slope of ln N against ln C where N holds the frontier, at even steps of ln C from the end of the smallest run to the last change of
    holder."""
    start = _start(records, "C")
    holders = [point for point in front if point.x >= start]
    if len({point.n for point in holders}) < 2:
        return math.nan
    grid = np.linspace(math.log(holders[0].x), math.log(holders[-1].x), STEPS)
    places = np.searchsorted([math.log(point.x) for point in holders], grid + 1e-12, side="right") - 1
    sizes = np.log([holders[k].n for k in places])
    return float(np.polyfit(grid, sizes, 1)[0])
