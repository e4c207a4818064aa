"""IsoFLOP curves (Hoffmann et al. 2022, approach 2): at each compute budget a parabola of the loss over ln N, and how its minimum moves.

A parabola is an approximation: over a wide range of sizes, or one that lies to one side of the minimum, its minimum is biased even without
noise. So minima at the edge are no result, and the exponent stands beside the surface's, beta / (alpha + beta), with their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from var_scale.study.laws import LEVEL, LawFit
from var_scale.study.power import fit_law
from var_scale.study.record import RunRecord
from var_scale.study.surface import fit_surface

SAME = 0.05
"""budgets that differ by less are one"""


@dataclass(frozen=True)
class Curve:
    """The runs of one budget: the loss over ln N as a parabola. Without a minimum inside the sizes `reason` says why."""

    flops: float
    runs: tuple[str, ...]
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    best_n: float
    best_loss: float
    coefficients: tuple[float, ...]
    """of 1, u, u^2 with u = ln N - mean"""
    reason: str = ""


@dataclass(frozen=True)
class IsoFlop:
    """All curves; the law of the optimal size, N ~ C^a, from their minima; and the surface's."""

    metric: str
    curves: tuple[Curve, ...]
    exponent: float
    interval: tuple[float, float]
    surface: LawFit

    @property
    def split(self) -> float:
        """The surface's exponent of N, NaN where it did not converge."""
        return self.surface.params.get("split", math.nan)

    def to_json(self) -> dict[str, Any]:
        """Entry of fit.json."""
        return {"curves": [asdict(curve) for curve in self.curves], "exponent": self.exponent, "interval": self.interval,
                "surface": self.surface.to_json(), "split": self.split}  # fmt: skip


def budgets(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of equal training FLOPs, three sizes or more together, smallest budget first."""
    groups: list[list[RunRecord]] = []
    for run in sorted(records, key=lambda record: record.flops_exact):
        if groups and run.flops_exact <= groups[-1][0].flops_exact * (1 + SAME):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [group for group in groups if len({run.params_paper for run in group}) >= 3]


def curve(group: Sequence[RunRecord], metric: str) -> Curve:
    """The parabola of one budget, by least squares; seeds of a size count each."""
    runs = sorted(group, key=lambda run: run.params_paper)
    n, loss = np.array([float(run.params_paper) for run in runs]), np.array([run.metric(metric) for run in runs])
    u = np.log(n)
    middle = float(u.mean())
    design = np.stack([np.ones_like(u), u - middle, (u - middle) ** 2], axis=1)
    c = np.linalg.lstsq(design, loss, rcond=None)[0]
    reason, best = "", math.nan
    if c[2] <= 0:
        reason = "the losses do not bend upwards"
    else:
        best = middle - c[1] / (2 * c[2])
        if not u.min() < best < u.max():
            reason, best = "the minimum lies at the edge of the sizes", math.nan
    value = float(c[0] - c[1] ** 2 / (4 * c[2])) if not reason else math.nan
    flops = math.exp(float(np.log([run.flops_exact for run in runs]).mean()))
    return Curve(flops, tuple(run.name for run in runs), tuple(n.tolist()), tuple(loss.tolist()),
                 math.exp(best) if not reason else math.nan, value, tuple(map(float, c)), reason)  # fmt: skip


def fit_isoflop(records: Sequence[RunRecord], metric: str = "loss_avg", surface: LawFit | None = None) -> IsoFlop | None:
    """Curves of all budgets that have three sizes, None where there is none. The exponent needs two minima, its interval three. `surface`:
    a fit of the runs that is there already."""
    groups = budgets([run for run in records if math.isfinite(run.metric(metric)) and run.metric(metric) > 0])
    if not groups:
        return None
    curves = tuple(curve(group, metric) for group in groups)
    found = [c for c in curves if not c.reason]
    exponent, interval = math.nan, (math.nan, math.nan)
    if len(found) >= 2:
        x, y = np.log([c.flops for c in found]), np.log([c.best_n for c in found])
        exponent = float(np.polyfit(x, y, 1)[0])
        if len(found) >= 3:
            law = fit_law("power", [math.exp(-value) for value in x], [math.exp(value) for value in y], noise_floor=0)
            interval = law.intervals.get("alpha", interval)
    if surface is None:
        inside = [run for group in groups for run in group]
        surface = fit_surface([run.params_paper for run in inside], [run.tokens for run in inside], [run.metric(metric) for run in inside],
                              metric=metric)  # fmt: skip
    return IsoFlop(metric, curves, exponent, interval, surface)


def sentences(result: IsoFlop) -> list[str]:
    """What the curves say, a line each."""
    lines = []
    for c in result.curves:
        where = c.reason or f"best N {c.best_n:.3g}, {result.metric} {c.best_loss:.4f}"
        lines.append(f"{c.flops:.3g} FLOP, {len(c.sizes)} runs: {where}")
    if math.isfinite(result.exponent):
        low, high = result.interval
        span = f" ({100 * LEVEL:.0f} % {low:.3f} to {high:.3f})" if math.isfinite(low) else ""
        lines.append(f"optimal size from the parabolas: N ~ C^{result.exponent:.3f}{span}")
        if math.isfinite(result.split):
            lines.append(f"from the surface E + A N^-alpha + B D^-beta: N ~ C^{result.split:.3f}; they differ by "
                         f"{result.exponent - result.split:+.3f}, of which the parabolas' bias is a part")  # fmt: skip
        else:
            lines.append(f"the surface gives nothing beside it: {result.surface.reason}")
    return lines
