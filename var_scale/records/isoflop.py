"""IsoFLOP curves (Hoffmann et al. 2022, arXiv:2203.15556, approach 2).

At each compute budget a parabola of the loss over ln N, and how its minimum moves with the budget.
A parabola is an approximation: over a wide range of sizes, or one that lies to one side of the
minimum, its minimum is biased even without noise. So only the sizes within a factor of WINDOW of
the minimum enter, minima at the edge are no result, and the exponent is reported beside that of the
surface, beta / (alpha + beta), with their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_scale.laws.curve import fit_law
from var_scale.laws.forms import Array
from var_scale.laws.law import LawFit
from var_scale.records.record import RunRecord

SAME = 0.05
"""Budgets that differ by less, relatively, are one."""
WINDOW = 4.0
"""Sizes smaller or larger than the minimum by more than this factor do not enter the parabola."""
ROUNDS = 20
"""Most moves of the window; it settles after two to four."""


@dataclass(frozen=True)
class Curve:
    """The runs of one budget: the loss over ln N as a parabola about the minimum."""

    flops: float
    runs: tuple[str, ...]
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    best_n: float
    best_loss: float
    coefficients: tuple[float, ...]
    """Of 1, u, u^2 with u = ln N - its mean over all `sizes`."""
    entered: tuple[str, ...]
    """The runs of the parabola: those within the window."""
    reason: str = ""
    """Why there is no minimum inside the sizes."""
    code: str = ""
    """The same for programs: no_bend or at_edge."""


@dataclass(frozen=True)
class IsoFlop:
    """All curves; the law of the optimal size, N ~ C^a, from their minima; and the surface's."""

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
        return {
            "curves": [asdict(curve) for curve in self.curves],
            "exponent": self.exponent,
            "interval": self.interval,
            "surface": self.surface.to_json(),
            "split": self.split,
        }


def budgets(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups of at least three sizes with equal training FLOPs, smallest budget first."""
    groups: list[list[RunRecord]] = []
    for run in sorted(records, key=lambda record: record.flops_exact):
        if groups and run.flops_exact <= groups[-1][0].flops_exact * (1 + SAME):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [group for group in groups if len({run.params_paper for run in group}) >= 3]


def curve(group: Sequence[RunRecord]) -> Curve:
    """The parabola of one budget, by least squares; each seed of a size counts."""
    runs = sorted(group, key=lambda run: run.params_paper)
    n = np.array([float(run.n) for run in runs])
    loss = np.array([run.loss_avg for run in runs])
    u = np.log(n) - float(np.log(n).mean())
    inside, c = _windowed(u, loss)
    code = reason = ""
    best = -c[1] / (2 * c[2]) if c[2] > 0 else math.nan
    if c[2] <= 0:
        code, reason = "no_bend", "the losses do not bend upwards"
    elif not u.min() < best < u.max():
        code, reason = "at_edge", "the minimum lies at the edge of the sizes"
    return Curve(
        math.exp(float(np.log([float(run.flops_exact) for run in runs]).mean())),
        tuple(run.name for run in runs),
        tuple(n.tolist()),
        tuple(loss.tolist()),
        math.nan if code else math.exp(best + float(np.log(n).mean())),
        math.nan if code else float(c[0] - c[1] ** 2 / (4 * c[2])),
        tuple(map(float, c)),
        tuple(run.name for run, used in zip(runs, inside, strict=True) if used),
        reason,
        code,
    )


def _windowed(u: Array, loss: Array) -> tuple[NDArray[np.bool_], Array]:
    """Which points enter, (n,), and the coefficients of 1, u, u^2 of their parabola.

    The window first lies about the smallest loss and then about the minimum of its parabola, until
    the same points enter. At least the three sizes nearest to its middle enter.
    """
    middle = float(u[loss.argmin()])
    inside = np.zeros(len(u), dtype=bool)
    for _ in range(ROUNDS):
        away = np.abs(u - middle)
        third = np.sort(np.abs(np.unique(u) - middle))[2]
        # Sizes are rounded, so one at the edge of the window counts as inside.
        reach = max(math.log(WINDOW), float(third)) + 1e-3
        if (inside == (away <= reach)).all():
            break
        inside = away <= reach
        design = np.stack([np.ones_like(u), u, u**2], axis=1)[inside]
        c = np.linalg.lstsq(design, loss[inside], rcond=None)[0]
        if c[2] <= 0:
            break
        middle = float(np.clip(-c[1] / (2 * c[2]), u.min(), u.max()))
    return inside, np.asarray(c)


def fit_isoflop(records: Sequence[RunRecord], surface: LawFit) -> IsoFlop | None:
    """Curves of the average loss of all budgets that have three sizes; None if there is none.

    The exponent needs two minima, its interval three.

    Args:
        surface: the form chinchilla, fitted to the runs.
    """
    usable = [run for run in records if 0 < run.loss_avg < math.inf]
    groups = budgets(usable)
    if not groups:
        return None
    curves = tuple(curve(group) for group in groups)
    found = [c for c in curves if not c.code]
    exponent, interval = math.nan, (math.nan, math.nan)
    if len(found) >= 2:
        x, y = np.log([c.flops for c in found]), np.log([c.best_n for c in found])
        exponent = float(np.polyfit(x, y, 1)[0])
        if len(found) >= 3:
            law = fit_law("power", np.exp(x), np.exp(y), noise_floor=0, rising=True)
            interval = law.intervals.get("exponent", interval)
    return IsoFlop(curves, exponent, interval, surface)
