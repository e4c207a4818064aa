"""What is measured in each step without making the GPU wait, and read once a window; and what to do about steps that were not taken."""

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


@dataclass
class Window:
    """The steps since the last look; every field is a mean over ranks and steps unless said."""

    steps: int
    loss: float
    """of the steps whose loss was finite; NaN where none was"""
    loss_largest: float
    """of a step and rank"""
    loss_per_scale: list[float]
    """cross-entropy of each scale that was trained"""
    grad_norm: float
    """of the last step"""
    grad_norm_largest: float
    skipped: int
    """steps not taken: the gradient was not finite"""
    streak: int
    """the most of them in a row"""
    bad: int
    """of them such that no loss scale explains them: the loss itself was not finite, or float16 is not in use"""
    seconds: float
    """wall time, of rank 0"""
    data_seconds: float
    """waiting for data, of the rank that waited longest"""
    slowest_rank: int
    """that rank"""
    stop: bool
    save: bool


@dataclass
class Monitor:
    """One rank's collector."""

    world: World
    lengths: list[int]
    """tokens of each scale"""
    scaled: bool
    """a loss scale is in use: a gradient may overflow without harm"""
    began: float = field(default_factory=time.monotonic)
    data_seconds: float = 0.0
    rows: list[Tensor] = field(default_factory=list)
    per_scale: list[Tensor] = field(default_factory=list)
    streak: Tensor | None = None

    def add(self, losses: list[Tensor], ce_BL: Tensor, stats: StepStats) -> None:
        """One step: the losses of its micro-batches, the cross-entropy of the last one, and the engine's report."""
        loss = torch.stack(losses).mean()
        bad = stats.skipped * (~torch.isfinite(loss)).float() if self.scaled else stats.skipped
        streak = stats.skipped if self.streak is None else (self.streak + 1) * stats.skipped
        self.streak = streak
        self.rows.append(torch.stack([loss.float(), stats.grad_norm.float(), stats.skipped, bad, streak]))
        lengths = [n for n, total in zip(self.lengths, accumulate(self.lengths), strict=True) if total <= ce_BL.shape[1]]
        mean_S = torch.stack([part.mean() for part in ce_BL.split(lengths, dim=1)])
        self.per_scale.append(torch.nn.functional.pad(mean_S, (0, len(self.lengths) - len(lengths)), value=math.nan))

    def pause(self, seconds: float) -> None:
        """Time that was spent on something else, such as an evaluation, and belongs to no step."""
        self.began += seconds

    def look(self, stop: bool, save: bool) -> Window:
        """Exchange with the other ranks, once, and start a new window. `stop`: any rank's wish counts; `save`: rank 0's."""
        now, rows = time.monotonic(), torch.stack(self.rows)  # (steps, 5)
        scale_S = torch.stack(self.per_scale).double().nanmean(0)
        host = torch.tensor([self.data_seconds, stop, save, now - self.began], dtype=torch.float64, device=rows.device)
        loss, norm = rows[:, 0].double(), rows[:, 1].double()
        finite = torch.where(torch.isfinite(loss), loss, math.nan)
        facts = torch.stack([finite.nanmean(), loss.max(), norm[-1], norm.max(), rows[:, 2].sum(), rows[:, 3].sum(), rows[:, 4].max()])
        table = self.world.gather(torch.cat([facts.double(), host, scale_S])).tolist()
        first, steps = table[0], len(self.rows)
        waits = [row[7] for row in table]
        window = Window(
            steps=steps, loss=_mean(row[0] for row in table), loss_largest=max(row[1] for row in table),
            loss_per_scale=[_mean(values) for values in zip(*(row[11:] for row in table), strict=True)],
            grad_norm=first[2], grad_norm_largest=first[3], skipped=round(first[4]), bad=round(max(row[5] for row in table)),
            streak=round(first[6]), seconds=first[10], data_seconds=max(waits), slowest_rank=waits.index(max(waits)),
            stop=any(row[8] for row in table), save=bool(first[9]),
        )  # fmt: skip
        window.loss_per_scale = [value for value in window.loss_per_scale if not math.isnan(value)]
        self.began, self.data_seconds, self.rows, self.per_scale = now, 0.0, [], []
        return window


def _mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


class Spikes:
    """Tells when the loss or the gradient norm leaves what it was: more than 8 standard deviations above the mean of the last windows."""

    def __init__(self) -> None:
        self.history: dict[str, deque[float]] = {}

    def look(self, name: str, value: float) -> str:
        """A description of the spike, or nothing."""
        seen = self.history.setdefault(name, deque(maxlen=HISTORY))
        text = ""
        if len(seen) >= HISTORY // 4:
            mean, sigma = statistics.fmean(seen), statistics.pstdev(seen)
            if value > mean + SPIKE_SIGMAS * sigma and value > 1.05 * mean:
                text = f"{name} {value:.4g}, {mean:.4g} +- {sigma:.2g} before"
        if math.isfinite(value):
            seen.append(value)
        return text
