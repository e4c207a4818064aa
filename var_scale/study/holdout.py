"""The test of a law: fit all sizes but the largest, predict the largest, compare with what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var_scale.study.laws import Form, LawFit, Prediction, plain
from var_scale.study.power import NOISE_FLOOR, fit_law
from var_scale.study.record import RunRecord, seed_noise, size_means


def noise_floor(records: Sequence[RunRecord], metric: str) -> float:
    """Relative deviation of a run that intervals assume at least: between seeds where there are some, never below NOISE_FLOOR."""
    noise = seed_noise(records, metric)
    return NOISE_FLOOR if math.isnan(noise) else max(NOISE_FLOOR, noise)


@dataclass(frozen=True)
class HoldOut:
    """Prediction of the largest size from the smaller ones. Without a converged fit `prediction` is None and `reason` says why."""

    metric: str
    form: Form
    held: tuple[str, ...]
    """runs of the largest size"""
    n: float
    measured: float
    """mean over the seeds of the largest size"""
    prediction: Prediction | None
    previous: float
    """value of the next smaller size: what a guess without any law would be"""
    fit: LawFit | None
    reason: str = ""

    @property
    def relative_error(self) -> float:
        """predicted / measured - 1."""
        return self.prediction.value / self.measured - 1 if self.prediction else math.nan

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the 95 % prediction interval."""
        return self.prediction is not None and self.prediction.low <= self.measured <= self.prediction.high

    @property
    def gain_fraction(self) -> float:
        """|predicted - measured| over |previous - measured|: below 1 the law beats guessing the next smaller size's value."""
        return abs(self.prediction.value - self.measured) / self.step if self.prediction and self.step > 0 else math.nan

    @property
    def step(self) -> float:
        """|previous - measured|: what the largest size gained over the next smaller one."""
        return abs(self.previous - self.measured)

    @property
    def width_fraction(self) -> float:
        """Width of the prediction interval over the step. Above 2 or so, hardly any result could have failed the test."""
        return (self.prediction.high - self.prediction.low) / self.step if self.prediction and self.step > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        p = self.prediction
        value: dict[str, Any] = plain({
            "metric": self.metric, "form": self.form, "held": self.held, "n": self.n, "measured": self.measured, "previous": self.previous,
            "predicted": p.value if p else None, "low": p.low if p else None, "high": p.high if p else None,
            "relative_error": self.relative_error, "inside": self.inside, "gain_fraction": self.gain_fraction,
            "width_fraction": self.width_fraction, "reason": self.reason,
        })  # fmt: skip
        return value | {"fit": self.fit.to_json() if self.fit else None}


def hold_out(
    records: Sequence[RunRecord], metric: str, form: Form = "power", *, floor: float = 0.0, size: str = "params_paper", seed: int = 0
) -> HoldOut:
    """Hold the largest size (all its seeds) out of the fit, and of the noise between seeds.

    `floor` is used by the form power, `size` chooses how N is counted."""
    sizes = sorted({record.size(size) for record in records})
    if len(sizes) < 2:
        reason = f"{len(sizes)} healthy size{'' if len(sizes) == 1 else 's'}: nothing is left to predict from"
        return HoldOut(metric, form, (), math.nan, math.nan, None, math.nan, None, reason)
    held = [record for record in records if record.size(size) == sizes[-1]]
    train = [record for record in records if record.size(size) < sizes[-1]]
    train_names, ns, values = size_means(train, metric, size)
    measured = size_means(held, metric, size)[2][0]
    left_out = [(record.name, "held_out", "the largest size, kept out to test the law") for record in held]
    fit = fit_law(form, ns, values, metric=metric, floor=floor, rows=train_names, excluded=left_out, seed=seed,
                  noise_floor=noise_floor(train, metric))  # fmt: skip
    prediction = fit.at(sizes[-1]) if fit.converged else None
    names = tuple(record.name for record in held)
    return HoldOut(metric, form, names, float(sizes[-1]), measured, prediction, values[-1], fit, fit.reason)


def budget_curve(records: Sequence[RunRecord], metric: str, floor: float = 0.0, size: str = "params_paper") -> tuple[HoldOut, ...]:
    """The largest size predicted by the power law of the 3, 4, ... smallest sizes: what each step up the ladder was worth."""
    sizes = sorted({record.size(size) for record in records})
    largest = [record for record in records if record.size(size) == sizes[-1]] if sizes else []
    return tuple(
        hold_out([record for record in records if record.size(size) <= sizes[count - 1]] + largest, metric, "power", floor=floor, size=size)
        for count in range(3, len(sizes))
    )
