"""Measurements of every step, collected on the device without waiting and read once per window."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from var_scale.train.engine.base import StepStats
from var_scale.train.world import World

SPIKE_SIGMAS, HISTORY = 8.0, 64
"""Standard deviations by which a spike exceeds the mean, and the windows that the mean covers."""


@dataclass
class Window:
    """The steps since the last exchange. Fields are means over ranks and steps unless noted."""

    steps: int
    loss: float
    """of the steps with a finite loss; NaN if there is none"""
    loss_largest: float
    """largest of all steps and ranks"""
    loss_per_scale: list[float]
    """cross-entropy of each trained scale"""
    grad_norm: float
    """of the last step"""
    grad_norm_largest: float
    skipped: int
    """steps not taken: the gradient was not finite"""
    streak: int
    """the longest series of them"""
    bad: int
    """those that a loss scale does not explain: the loss itself was not finite, or the precision is
    not float16"""
    seconds: float
    """wall time of rank 0"""
    data_seconds: float
    """time that the slowest rank waited for data"""
    slowest_rank: int
    """that rank"""
    stop: bool
    save: bool


@dataclass
class Monitor:
    """The collector of one rank."""

    world: World
    lengths: list[int]
    """tokens of each scale"""
    scaled: bool
    """a loss scale is used: a gradient may overflow without harm"""
    began: float = field(default_factory=time.monotonic)
    data_seconds: float = 0.0
    rows: list[Tensor] = field(default_factory=list)
    per_scale: list[Tensor] = field(default_factory=list)
    streak: Tensor | None = None

    def add(self, losses: list[Tensor], ce_BL: Tensor, stats: StepStats) -> None:
        """Add one step: the losses of its micro-batches, the cross-entropy of the last one, and the
        engine's statistics."""
        loss = torch.stack(losses).mean()
        bad = stats.skipped * (~torch.isfinite(loss)).float() if self.scaled else stats.skipped
        # How many steps in a row were skipped, counted on the device; a taken step sets it to 0.
        streak = stats.skipped if self.streak is None else (self.streak + 1) * stats.skipped
        self.streak = streak
        self.rows.append(
            torch.stack([loss.float(), stats.grad_norm.float(), stats.skipped, bad, streak])
        )
        lengths = [
            n
            for n, total in zip(self.lengths, accumulate(self.lengths), strict=True)
            if total <= ce_BL.shape[1]
        ]
        # Scales that progressive training does not train yet are NaN, which the mean leaves out.
        mean_S = torch.stack([part.mean() for part in ce_BL.split(lengths, dim=1)])
        self.per_scale.append(
            torch.nn.functional.pad(mean_S, (0, len(self.lengths) - len(lengths)), value=math.nan)
        )

    def pause(self, seconds: float) -> None:
        """Exclude time spent on something else, such as an evaluation."""
        self.began += seconds

    def look(self, stop: bool, save: bool) -> Window:
        """Exchange once with the other ranks and start a new window.

        Args:
            stop: this rank was asked to stop; one rank is enough.
            save: a checkpoint is due; only the value of rank 0 counts.
        """
        # (steps, 5): loss, gradient norm, skipped, bad, streak.
        now, rows = time.monotonic(), torch.stack(self.rows)
        scale_S = torch.stack(self.per_scale).double().nanmean(0)
        host = torch.tensor(
            [self.data_seconds, stop, save, now - self.began],
            dtype=torch.float64,
            device=rows.device,
        )
        loss, norm = rows[:, 0].double(), rows[:, 1].double()
        finite = torch.where(torch.isfinite(loss), loss, math.nan)
        facts = torch.stack(
            [
                finite.nanmean(),
                loss.max(),
                norm[-1],
                norm.max(),
                rows[:, 2].sum(),
                rows[:, 3].sum(),
                rows[:, 4].max(),
            ]
        )
        # One row per rank: facts in columns 0 to 6, host in 7 to 10, the scales from 11 on. Loss
        # and `bad` differ between ranks. The gradient norm is that of all ranks together, and a
        # step is skipped on all of them or on none, so those columns are equal.
        table = self.world.gather(torch.cat([facts.double(), host, scale_S])).tolist()
        first, steps = table[0], len(self.rows)
        waits = [row[7] for row in table]
        window = Window(
            steps=steps,
            loss=_mean(row[0] for row in table),
            loss_largest=max(row[1] for row in table),
            loss_per_scale=[
                _mean(values) for values in zip(*(row[11:] for row in table), strict=True)
            ],
            grad_norm=first[2],
            grad_norm_largest=first[3],
            skipped=round(first[4]),
            bad=round(max(row[5] for row in table)),
            streak=round(first[6]),
            seconds=first[10],
            data_seconds=max(waits),
            slowest_rank=waits.index(max(waits)),
            stop=any(row[8] for row in table),
            save=bool(first[9]),
        )
        window.loss_per_scale = [value for value in window.loss_per_scale if not math.isnan(value)]
        self.began, self.data_seconds, self.rows, self.per_scale = now, 0.0, [], []
        return window


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


class Spikes:
    """Detects a loss or gradient norm more than 8 standard deviations above the mean of the last
    windows."""

    def __init__(self) -> None:
        self.history: dict[str, deque[float]] = {}

    def look(self, name: str, value: float) -> str:
        """A description of the spike, or an empty string."""
        seen = self.history.setdefault(name, deque(maxlen=HISTORY))
        text = ""
        if len(seen) >= HISTORY // 4:
            mean, sigma = statistics.fmean(seen), statistics.pstdev(seen)
            if value > mean + SPIKE_SIGMAS * sigma and value > 1.05 * mean:
                text = f"{name} {value:.4g}, {mean:.4g} +- {sigma:.2g} before"
        if math.isfinite(value):
            seen.append(value)
        return text
