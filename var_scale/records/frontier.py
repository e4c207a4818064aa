"""The frontier: the best value at each amount of compute, or of data, over all runs.

With its power law and the size that holds it. Against compute this is C_min of the VAR paper and
approach 1 of Hoffmann et al. 2022 (arXiv:2203.15556).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from var_scale.laws.bootstrap import Indices, bootstrap_interval
from var_scale.laws.curve import fit_law
from var_scale.laws.law import LawFit, plain
from var_scale.records.record import RunRecord

Along = Literal["C", "tokens"]
RULE = (
    "all evaluations of all kept runs, sorted by training FLOPs; a point is on the frontier when "
    "its value is below every value at equal or less compute; the fit uses frontier points at or "
    "above the compute at which the smallest run ended"
)
BOOTSTRAP_DRAWS = 200
STEPS = 60
"""Even steps of ln C at which the size that holds the frontier is read."""


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
    """95 % bootstrap by run. The interval of the fit itself is too narrow, because the points of
    one run are not independent."""
    size_exponent: float
    """a of N ~ C^a, N the size that holds the frontier at C; NaN along tokens or where one size
    holds all of it."""
    size_interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        value: dict[str, Any] = plain(
            {
                "metric": self.metric,
                "along": self.along,
                "rule": RULE,
                "points": [[p.run, p.x, p.value] for p in self.points],
                "alpha_interval": self.alpha_interval,
                "size_exponent": self.size_exponent,
                "size_interval": self.size_interval,
            }
        )
        return value | {"fit": self.fit.to_json()}


def evaluations(
    records: Sequence[RunRecord], metric: str, along: Along = "C", flops: str = "flops_exact"
) -> list[FrontierPoint]:
    """All evaluations of the runs; a run without a curve counts with its final value.

    Args:
        flops: how compute is counted: flops_exact, flops_6nd or flops_paper.
    """
    points = []
    for record in records:
        total = getattr(record, flops)
        # Every way of counting is proportional to the images, so a curve is scaled by the totals.
        ratio = total / record.flops_exact
        curve = [(p.flops_exact * ratio, getattr(p, metric)) for p in record.curve]
        for at, value in curve or [(total, record.metric(metric))]:
            x = at if along == "C" else round(record.tokens * at / record.flops_exact)
            if at > 0 and value > 0:
                point = FrontierPoint(record.name, float(x), float(value), record.n)
                points.append(point)
    return points


def pareto(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Running minimum in x."""
    best, front = float("inf"), []
    for point in sorted(points, key=lambda p: (p.x, p.value)):
        if point.value < best:
            best = point.value
            front.append(point)
    return tuple(front)


def fit_frontier(
    records: Sequence[RunRecord],
    metric: str = "loss_avg",
    floor: float = 0.0,
    seed: int = 0,
    along: Along = "C",
) -> Frontier:
    """Frontier and its law.

    Args:
        floor: E of the law.
        seed: seed of the bootstrap.
    """
    points = [evaluations([record], metric, along) for record in records]
    front = pareto([point for curve in points for point in curve])
    start = _start(records, "flops_exact") if along == "C" else 0.0
    fit = _fit(front, start, metric, floor, along)
    size = _size_exponent(front, start) if along == "C" else math.nan
    if not fit.converged:
        return Frontier(metric, along, front, fit, None, size, None)

    def resampled(index: Indices) -> tuple[tuple[FrontierPoint, ...], float]:
        first = _start([records[i] for i in index], "flops_exact") if along == "C" else 0.0
        return pareto([point for i in index for point in points[i]]), first

    def alpha(index: Indices) -> float | None:
        redone = _fit(*resampled(index), metric, floor, along)
        return redone.params["alpha"] if redone.converged else None

    def exponent(index: Indices) -> float | None:
        value = _size_exponent(*resampled(index))
        return value if math.isfinite(value) else None

    alphas = bootstrap_interval(alpha, len(records), seed, BOOTSTRAP_DRAWS)
    sizes = None
    if math.isfinite(size):
        sizes = bootstrap_interval(exponent, len(records), seed, BOOTSTRAP_DRAWS)
    return Frontier(metric, along, front, fit, alphas, size, sizes)


def frontier_law(records: Sequence[RunRecord], metric: str, floor: float, flops: str) -> LawFit:
    """The power law of the frontier alone, along compute counted as `flops`."""
    front = pareto(evaluations(records, metric, flops=flops))
    return _fit(front, _start(records, flops), metric, floor, "C")


def _start(records: Sequence[RunRecord], flops: str) -> float:
    """Compute at which the smallest run ended: before it the frontier is that run's own curve."""
    return float(min((getattr(record, flops) for record in records), default=0))


def _fit(
    front: Sequence[FrontierPoint], start: float, metric: str, floor: float, along: Along
) -> LawFit:
    """The power law of the points of a frontier from `start` on."""
    used = [point for point in front if point.x >= start]
    return fit_law(
        "power",
        [point.x for point in used],
        [point.value for point in used],
        metric=metric,
        variable=along,
        floor=floor,
        rows=[f"{point.run}@{point.x:.4g}" for point in used],
    )


def _size_exponent(front: Sequence[FrontierPoint], start: float) -> float:
    """Slope of ln N against ln C where N holds the frontier.

    At even steps of ln C from the end of the smallest run to the last change of the holder, because
    the points themselves crowd where evaluations are frequent.
    """
    holders = [point for point in front if point.x >= start]
    if len({point.n for point in holders}) < 2:
        return math.nan
    logs = [math.log(point.x) for point in holders]
    grid = np.linspace(logs[0], logs[-1], STEPS)
    places = np.searchsorted(logs, grid + 1e-12, side="right") - 1
    sizes = np.log([holders[k].n for k in places])
    return float(np.polyfit(grid, sizes, 1)[0])
