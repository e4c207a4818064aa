"""The seam between the loop and what carries a step out (contract 5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from var_scale.config.schema import TrainConfig
from var_scale.train.optim import set_rates
from var_scale.train.step import TrainStep

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepStats:
    """What one optimiser step reports, as tensors, so that reading them (which makes a GPU wait) is the caller's choice."""

    grad_norm: Tensor
    """before clipping, without the loss scale; () float32"""
    skipped: Tensor
    """1 where the gradient was not finite and the step was not taken; () float32"""


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of a flattened tensor, as it lies on this rank; the unit of checkpoints."""

    kind: str
    """weight (the float32 master), exp_avg, exp_avg_sq, ema"""
    name: str
    """official parameter name"""
    shape: tuple[int, ...]
    """of the whole tensor"""
    start: int
    """place of the first element in the flattened tensor"""
    tensor: Tensor
    """(n,) float32, a view of the engine's own memory"""
    copy: tuple[int, int] = (0, 1)
    """which of how many ranks that hold the same elements; they share the writing"""


class LossScale:
    """Loss scale of float16 by the reference's rules: starts at 2^11, doubles after 1000 good steps up to 2^15, halves at an overflow."""

    FIRST, LARGEST, PATIENCE = 2.0**11, 2.0**15, 1000

    def __init__(self, device: torch.device):
        self.scale = torch.tensor(self.FIRST, device=device)
        self.good = torch.tensor(0.0, device=device)

    def update(self, skipped: Tensor) -> None:
        """After a step; nothing waits for the GPU."""
        self.good = (self.good + 1) * (1 - skipped)
        grow = self.good >= self.PATIENCE
        self.scale = (self.scale * torch.where(grow, 2.0, 1.0) * torch.where(skipped > 0, 0.5, 1.0)).clamp(max=self.LARGEST)
        self.good = torch.where(grow, 0.0, self.good)

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"scale": float(self.scale), "good_steps": float(self.good)}

    def load(self, state: dict[str, float]) -> None:
        """From a checkpoint."""
        self.scale.fill_(state["scale"])
        self.good.fill_(state["good_steps"])


def guard(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, clip: float, scaler: LossScale | None) -> StepStats:
    """Take the loss scale out, clip the gradients to the total norm `clip` (0: not), and tell the fused optimiser not to step when the
    norm is not finite. Nothing waits for the GPU."""
    held = [p for p in parameters if p.grad is not None]
    if scaler:
        local = [g.to_local() if isinstance(g, DTensor) else g for p in held if (g := p.grad) is not None]
        torch._foreach_mul_(local, 1 / scaler.scale)
    norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(held, clip if clip > 0 else float("inf"), norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    skipped = (~torch.isfinite(norm)).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # the way torch.amp.GradScaler tells a fused optimiser
    if scaler:
        scaler.update(skipped)
    return StepStats(norm, skipped)


class AveragedWeights:
    """Exponential moving average of the master weights this rank holds: a <- decay a + (1 - decay) w after every step."""

    def __init__(self, engine: Engine, decay: float):
        self.decay = decay
        self.tensors = [tensor.clone() for tensor in self._weights(engine)]
        self.views: list[Tensor] | None = None

    @staticmethod
    def _weights(engine: Engine) -> list[Tensor]:
        return [piece.tensor for piece in engine.held() if piece.kind == WEIGHT]

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """After a step, taken or not."""
        self.views = self.views or self._weights(engine)  # after the first step: engines have settled where the masters lie
        torch._foreach_lerp_(self.tensors, self.views, 1 - self.decay)

    @torch.no_grad()
    def swap(self, engine: Engine) -> None:
        """Exchange averaged and trained values."""
        for average, weight in zip(self.tensors, self._weights(engine), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        engine.publish()


class Engine(ABC):
    """One optimiser step is `accumulate` times (`prepare`, forward, `backward`), then `step`.

    Gradients are the mean over ranks and micro-batches; clipping is by total norm (0: none); rates are set by the caller. A step whose
    gradient is not finite is not taken. Weights are already in `module.var` when an engine is built; `create_state` and `pieces` give the
    optimiser state of a checkpoint its place.
    """

    module: nn.Module  # what to call: the wrapped TrainStep
    optimizer: torch.optim.Optimizer

    def __init__(self, step_module: TrainStep, train: TrainConfig):
        self.accumulate, self.clip, self.betas = train.accumulate, train.clip, train.adam_betas
        self.device = next(step_module.parameters()).device
        self.average: AveragedWeights | None = None
        self.skipped = torch.zeros((), device=self.device)
        self.scaler = LossScale(self.device) if step_module.half_dtype == torch.float16 else None

    def prepare(self, last: bool) -> None:
        """Before the forward of a micro-batch; `last` marks the last one of the step, whose gradients are exchanged."""
        self.last = last

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    @abstractmethod
    def step(self) -> StepStats:
        """Reduce, clip, update, clear the gradients."""

    @abstractmethod
    def held(self) -> list[Piece]:
        """What this rank holds of master weights and, once they exist, moments."""

    def pieces(self) -> list[Piece]:
        """What this rank holds of everything a checkpoint has. Writing into a tensor sets it (weights: then `publish`)."""
        found = self.held()
        if self.average:
            weights = [piece for piece in found if piece.kind == WEIGHT]
            found += [replace(piece, kind="ema", tensor=tensor) for piece, tensor in zip(weights, self.average.tensors, strict=True)]
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the trained ones, for evaluation. Every rank calls it."""
        assert self.average
        self.average.swap(self)
        try:
            yield
        finally:
            self.average.swap(self)

    @abstractmethod
    def create_state(self, taken: int) -> None:
        """Make the optimiser state as after so many steps that were taken, with moments of zero."""

    def publish(self) -> None:  # noqa: B027  # nothing to do where the masters are the model's weights
        """After a change of the master weights: make the model's weights of them, where they are others."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients add up to the mean over micro-batches, times the loss scale."""
        loss = loss / self.accumulate
        return loss * self.scaler.scale if self.scaler else loss

    def extra_state(self) -> dict[str, Any]:
        """What else a continuation needs: the steps not taken, which AdamW did not count, and the loss scale."""
        return {"skipped_steps": int(self.skipped), **({"loss_scale": self.scaler.state()} if self.scaler else {})}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint, also one that another engine wrote."""
        self.skipped.fill_(state["skipped_steps"])
        if self.scaler and "loss_scale" in state:
            self.scaler.load(state["loss_scale"])

    def set_rates(self, lr: float, weight_decay: float) -> None:
        """Rates of the next step."""
        set_rates(self.optimizer, lr, weight_decay)

    def train_step_module(self) -> TrainStep:
        """The TrainStep under the wrapping."""
        module = getattr(self.module, "module", self.module)
        assert isinstance(module, TrainStep)
        return module

    def names(self) -> list[tuple[str, nn.Parameter]]:
        """VAR's parameters by official name."""
        return list(self.train_step_module().var.named_parameters())
