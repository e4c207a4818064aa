"""The test of a law: fit all sizes but the largest, predict the largest, compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var_scale.laws.curve import fit_law
from var_scale.laws.forms import PARAMETERS, Form
from var_scale.laws.law import LawFit, Prediction, plain
from var_scale.records import optimum
from var_scale.records.optimum import surface_of
from var_scale.records.record import RunRecord
from var_scale.records.sizes import size_means


@dataclass(frozen=True)
class HoldOut:
    """Prediction of the largest size from the smaller ones, None without a converged fit."""

    metric: str
    form: Form
    held: tuple[str, ...]
    """Runs of the largest size."""
    n: float
    measured: float
    """Mean over the seeds of the largest size."""
    prediction: Prediction | None
    previous: float
    """Value of the next smaller size: what a guess without any law would be."""
    fit: LawFit | None
    reason: str = ""
    """Why there is no prediction."""
    code: str = ""
    """The same for programs: that of the fit, or too_few."""

    @property
    def relative_error(self) -> float:
        """predicted / measured - 1."""
        return self.prediction.value / self.measured - 1 if self.prediction else math.nan

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the 95 % prediction interval."""
        at = self.prediction
        return at is not None and at.low <= self.measured <= at.high

    @property
    def step(self) -> float:
        """|previous - measured|: what the largest size gained over the next smaller one."""
        return abs(self.previous - self.measured)

    @property
    def gain_fraction(self) -> float:
        """|predicted - measured| / step: below 1 the law beats the value of the next smaller
        size as a guess."""
        at = self.prediction
        return abs(at.value - self.measured) / self.step if at and self.step > 0 else math.nan

    @property
    def width_fraction(self) -> float:
        """Width of the prediction interval / step. Above about 2 hardly any result could have
        failed the test."""
        at = self.prediction
        return (at.high - at.low) / self.step if at and self.step > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        p = self.prediction
        value: dict[str, Any] = plain(
            {
                "metric": self.metric,
                "form": self.form,
                "held": self.held,
                "n": self.n,
                "measured": self.measured,
                "previous": self.previous,
                "predicted": p.value if p else None,
                "low": p.low if p else None,
                "high": p.high if p else None,
                "relative_error": self.relative_error,
                "inside": self.inside,
                "gain_fraction": self.gain_fraction,
                "width_fraction": self.width_fraction,
                "reason": self.reason,
                "code": self.code,
            }
        )
        return value | {"fit": self.fit.to_json() if self.fit else None}


def hold_out(
    records: Sequence[RunRecord],
    metric: str,
    form: Form = "power",
    *,
    floor: float = 0.0,
    seed: int = 0,
) -> HoldOut:
    """Hold all seeds of the largest size out of the fit, and out of the noise between seeds.

    Args:
        floor: E of the form power.
        seed: seed of the bootstrap.
    """
    sizes = sorted({record.n for record in records})
    if len(sizes) < 2:
        counted = f"{len(sizes)} healthy size{'' if len(sizes) == 1 else 's'}"
        reason = f"{counted}: nothing is left to predict from"
        nan = math.nan
        return HoldOut(metric, form, (), nan, nan, None, nan, None, reason, "too_few")
    held = [record for record in records if record.n == sizes[-1]]
    train = [record for record in records if record.n < sizes[-1]]
    points = size_means(train, metric)
    measured = size_means(held, metric).values[0]
    why = "the largest size, kept out to test the law"
    fit = fit_law(
        form,
        points.sizes,
        points.values,
        metric=metric,
        floor=floor,
        rows=points.names,
        excluded=[(record.name, "held_out", why) for record in held],
        seed=seed,
        repeats=points.repeats,
    )
    return HoldOut(
        metric,
        form,
        tuple(record.name for record in held),
        float(sizes[-1]),
        measured,
        fit.at(sizes[-1]) if fit.converged else None,
        points.values[-1],
        fit,
        fit.reason,
        fit.code,
    )


def hold_out_surface(
    records: Sequence[RunRecord], metric: str, form: Form, seed: int = 0
) -> HoldOut | None:
    """Hold all runs of the largest size out of the surface of size and data, and predict its
    longest runs; None if the smaller sizes have no surface.

    Args:
        records: healthy runs, with all points of a grid.
        form: chinchilla or repeated.
        seed: seed of the bootstrap.
    """
    largest = max((record.n for record in records), default=0)
    train = [record for record in records if record.n < largest]
    fit = surface_of(train, metric, form, optimum.DRAWS, seed)
    if not fit.converged:
        return None
    tokens = max(record.tokens for record in records if record.n == largest)
    held = [r for r in records if r.n == largest and r.tokens == tokens]
    smaller = max(record.n for record in train)
    before = [r for r in train if r.n == smaller and r.tokens == tokens]
    # In a design without a common length the smaller size has only its law at this length.
    unique = held[0].unique_tokens if form == "repeated" else None
    guess = (
        size_means(before, metric).values
        if before
        else [float(fit.predict(smaller, tokens, unique))]
    )
    return HoldOut(
        metric,
        fit.form,
        tuple(record.name for record in held),
        float(largest),
        size_means(held, metric).values[0],
        fit.at(largest, d=tokens, unique=unique),
        guess[0],
        fit,
    )


def budget_curve(
    records: Sequence[RunRecord], metric: str, form: Form = "power", floor: float = 0.0
) -> tuple[HoldOut, ...]:
    """The largest size predicted by the law of ever more of the smallest sizes: what each step up
    the ladder added."""
    sizes = sorted({record.n for record in records})
    curve = []
    for count in range(PARAMETERS[form] + 1, len(sizes)):
        used = (*sizes[:count], sizes[-1])
        runs = [record for record in records if record.n in used]
        curve.append(hold_out(runs, metric, form, floor=floor))
    return tuple(curve)
