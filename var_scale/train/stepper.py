"""The optimiser step: the only one, for training, benchmarks and the plan's probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from var_scale.config.schema import Config
from var_scale.data.image_loader import ImageBatch
from var_scale.data.loader import Batch
from var_scale.train.engine.base import Engine, StepStats
from var_scale.train.fault import Faults
from var_scale.train.inputs import Tokens
from var_scale.train.noise import StepNoise
from var_scale.train.schedule import Schedule
from var_scale.train.world import World

PHASES = ("data", "forward", "backward", "optimiser")
"""The parts of a step, in order; the first three repeat for every micro-batch."""


class Batches(Protocol):
    """Where batches come from: a loader, or one that reads ahead."""

    def batch(self, step: int, micro_index: int = 0) -> Batch | ImageBatch:
        """The samples of this rank for one micro-batch of stream position `step`."""


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the device. Reading a value makes a GPU wait, so the caller decides
    when to do it."""

    losses: list[Tensor]
    """of the micro-batches, () each"""
    ce_BL: Tensor
    """cross-entropy of the last micro-batch, nats per token"""
    stats: StepStats
    data_seconds: float
    """time this rank waited for its batches"""


@dataclass
class Stepper:
    """One rank's optimiser step over an engine and a stream of batches."""

    config: Config
    world: World
    engine: Engine
    data: Tokens
    batches: Batches
    schedule: Schedule
    faults: Faults | None = None

    def stage(self, step: int) -> tuple[int, float]:
        """Progressive training at step `step`: the last scale trained (-1: all), and its weight."""
        return self.schedule.stage(step, len(self.config.tokenizer.patch_nums))

    def step(
        self,
        step: int,
        position: int | None = None,
        begin: Callable[[str], None] = lambda phase: None,
    ) -> StepResult:
        """Take one optimiser step.

        Args:
            step: its number from 0; sets learning rate, weight decay and stage.
            position: which samples of the endless stream it uses; differs from `step` after a
                rollback has skipped samples.
            begin: called with one of `PHASES` when that part begins.
        """
        engine, position = self.engine, step if position is None else position
        engine.set_rates(self.schedule.lr(step), self.schedule.wd(step))
        stage, newest = self.stage(step)
        # Drawn for the whole global batch on every rank, and then indexed by this rank's samples:
        # the noise of a sample does not depend on the world size.
        noise, losses, waited = StepNoise(self.config, position), [], 0.0
        for micro in range(engine.accumulate):
            begin("data")
            began = time.monotonic()
            if self.faults:
                self.faults.before_data(step + 1)
            batch = self.batches.batch(position, micro)
            waited += time.monotonic() - began
            # Gradients are exchanged with the last micro-batch only.
            engine.prepare(last=micro == engine.accumulate - 1)
            inputs = (*self.data.tensors(batch), *noise.of(batch, self.world))
            begin("forward")
            loss, ce_BL = engine.forward(inputs, stage, newest)
            if self.faults:
                loss = self.faults.after_forward(step + 1, loss)
            begin("backward")
            engine.backward(loss)
            losses.append(loss.detach())
        begin("optimiser")
        stats = engine.step()
        # A tensor: adding it does not wait for the device, `int(skipped)` would.
        engine.skipped += stats.skipped
        if engine.average:
            engine.average.update(engine)
        return StepResult(losses, ce_BL, stats, waited)
