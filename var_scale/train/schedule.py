"""Learning-rate and weight-decay schedules of the official trainer, as pure functions of the
step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from var_scale.config.schema import TrainConfig


def lr_factor(
    schedule: str, iteration: int, total: int, warmup: int, start: float, end: float
) -> float:
    """Learning rate divided by its peak at `iteration` of `total`.

    Linear from `start` to 1 over `warmup` iterations, then by `schedule` down to `end`: lin0 holds
    1 for 5 % of the rest, lin for 15 %, lin00 not at all; cos is a cosine; exp holds 15 % and then
    decays geometrically; lin<f>, such as lin0.8, is linear to a middle value over the share f and
    linear to `end` over the rest.
    """
    if iteration < warmup:
        return start + (1 - start) * iteration / warmup
    p = (iteration - warmup) / max(1, total - 1 - warmup)
    left = 1 - end
    if schedule == "cos":
        return end + left * (0.5 + 0.5 * math.cos(math.pi * p))
    if schedule == "exp":
        hold = 0.15
        return 1.0 if p < hold else end ** ((p - hold) / (1 - hold))
    if schedule in ("lin0", "lin", "lin00"):
        hold = {"lin0": 0.05, "lin": 0.15, "lin00": 0.0}[schedule]
        return 1.0 if p < hold else end + left * (1 - p) / (1 - hold)
    f = float(schedule.removeprefix("lin"))
    middle = (1 + end + left * (1 - f)) / 2
    return 1 + (middle - 1) * p / f if p < f or f >= 1 else end + (middle - end) * (1 - p) / (1 - f)


def weight_decay(iteration: int, total: int, start: float, end: float) -> float:
    """Cosine from `start` to `end` over the whole run."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * iteration / max(1, total - 1)))


def steps_per_epoch(config: TrainConfig, train_samples: int) -> int:
    """Steps per epoch as the reference counts them: the next epoch fills the last batch."""
    return -(-train_samples // config.batch_size)


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run by optimiser step.

    The reference counts micro-batches, so accumulation would change its schedule (and crashes
    there); here it does not.
    """

    config: TrainConfig
    total_steps: int
    warmup: int  # steps
    stage_warmup: float = 1.0  # steps over which a new scale's weight grows

    @staticmethod
    def of(config: TrainConfig, train_samples: int) -> Schedule:
        """The schedule of a config. An epoch has ceil(samples / batch) steps, as in the reference;
        the default warm-up is a fiftieth of the run."""
        per_epoch = steps_per_epoch(config, train_samples)
        steps = config.steps or max(1, round((config.epochs or 0) * per_epoch))
        share = 1 / 50 if not config.warmup_epochs else config.warmup_epochs * per_epoch / steps
        grow = (
            1 / 300
            if not config.progressive_warmup_epochs
            else config.progressive_warmup_epochs * per_epoch / steps
        )
        return Schedule(config, steps, round(share * steps), grow * steps)

    @property
    def peak_lr(self) -> float:
        """base_lr x batch / 256."""
        return self.config.base_lr * self.config.batch_size / 256

    def lr(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        c = self.config
        name = f"lin{c.progressive}" if c.progressive else c.lr_schedule
        return self.peak_lr * lr_factor(
            name, step, self.total_steps, self.warmup, c.lr_start, c.lr_end
        )

    def stage(self, step: int, scales: int) -> tuple[int, float]:
        """Progressive training at step `step`: the last trained scale (-1: all) and its loss
        weight.

        Between the warm-up and the share `progressive` of the run, scales are added one by one; the
        weight of a new one grows from 0.01 to 1, except for the last. This is the reference's rule;
        it also works from the first scale on, where the reference crashes.
        """
        c = self.config
        if not c.progressive:
            return -1, 1.0
        first, end = min(c.progressive_start, scales - 1), c.progressive * self.total_steps

        def at(g: int) -> int:
            """The last scale that is trained at step `g`."""
            if g <= self.warmup:
                return first
            if g >= end:
                return scales - 1
            return first + round((g - self.warmup) / (end - self.warmup) * (scales - 1 - first))

        stage = at(step)
        if stage == scales - 1:
            return -1, 1.0
        if stage == first:
            return stage, 1.0
        # Bisect for the step at which this stage began: `at` is monotonic.
        low, high = self.warmup, step
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if at(middle) < stage else (low, middle)
        return stage, min(1.0, max(0.01, (step - low + 1) / self.stage_warmup))

    def wd(self, step: int) -> float:
        """Weight decay of optimiser step `step`."""
        c = self.config
        end = c.weight_decay if c.weight_decay_end is None else c.weight_decay_end
        return weight_decay(step, self.total_steps, c.weight_decay, end)
