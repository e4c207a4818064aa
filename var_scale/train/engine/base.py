"""The interface between the loop and what carries out an optimiser step."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from var_scale.config.schema import TrainConfig
from var_scale.train.graphs import StepGraphs
from var_scale.train.optim import set_rates
from var_scale.train.step import TrainStep

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepStats:
    """What one optimiser step reports, as tensors: reading them makes a GPU wait, so the caller
    decides when."""

    grad_norm: Tensor
    """before clipping, without the loss scale; () float32"""
    skipped: Tensor
    """1 if the gradient was not finite and the step was not taken; () float32"""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a flattened tensor that this rank stores; the unit of checkpoints."""

    kind: str
    """weight (the float32 master), exp_avg, exp_avg_sq, ema"""
    name: str
    """official parameter name"""
    shape: tuple[int, ...]
    """of the complete tensor"""
    start: int
    """index of the first element in the flattened tensor"""
    tensor: Tensor
    """(n,) float32, a view of the memory of the engine"""
    copy: tuple[int, int] = (0, 1)
    """(index, count) of this rank among the ranks that store the same elements; they share
    writing"""


class LossScale:
    """Loss scale of float16 by the rules of the reference: it starts at 2^11, doubles after 1000
    good steps up to 2^15, and halves at an overflow."""

    FIRST, LARGEST, PATIENCE = 2.0**11, 2.0**15, 1000

    def __init__(self, device: torch.device):
        self.scale = torch.tensor(self.FIRST, device=device)
        self.good = torch.tensor(0.0, device=device)

    def update(self, skipped: Tensor) -> None:
        """Update after a step, without waiting for the GPU."""
        self.good = (self.good + 1) * (1 - skipped)
        grow = self.good >= self.PATIENCE
        self.scale = (
            self.scale * torch.where(grow, 2.0, 1.0) * torch.where(skipped > 0, 0.5, 1.0)
        ).clamp(max=self.LARGEST)
        self.good = torch.where(grow, 0.0, self.good)

    def state(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"scale": float(self.scale), "good_steps": float(self.good)}

    def load(self, state: dict[str, float]) -> None:
        """Load the state from a checkpoint."""
        self.scale.fill_(state["scale"])
        self.good.fill_(state["good_steps"])


def sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one of FSDP, of which this rank stores a part. The import of DTensor
    takes a second, which only a process that has such tensors pays."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def guard(
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip: float,
    scaler: LossScale | None,
) -> StepStats:
    """Make the fused optimiser remove the loss scale, clip the gradients to the total norm `clip`
    (0: no clipping), and skip the step if the norm is not finite.

    The optimiser divides the gradients by one number as it reads them, so that clipping needs no
    pass of its own. Nothing waits for the GPU.
    """
    norm = torch.nn.utils.get_total_norm([g for p in parameters if (g := p.grad) is not None])
    norm = norm.full_tensor() if sharded(norm) else norm
    scale = scaler.scale if scaler else torch.ones_like(norm)
    norm = norm / scale
    # As torch.nn.utils.clip_grads_with_norm_ does.
    excess = ((norm + 1e-6) / clip).clamp_min(1.0) if clip > 0 else torch.ones_like(norm)
    skipped = (~torch.isfinite(norm)).float()
    # As torch.amp.GradScaler does.
    optimizer.grad_scale = scale * excess  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    if scaler:
        scaler.update(skipped)
    return StepStats(norm, skipped)


class AveragedWeights:
    """Exponential moving average of the master weights that this rank stores:
    a <- decay a + (1 - decay) w after every step."""

    def __init__(self, engine: Engine, decay: float):
        self.decay = decay
        self.tensors = [tensor.clone() for tensor in self._weights(engine)]
        self.views: list[Tensor] | None = None

    @staticmethod
    def _weights(engine: Engine) -> list[Tensor]:
        return [piece.tensor for piece in engine.held() if piece.kind == WEIGHT]

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Update after a step, whether it was taken or not."""
        # From the first step on: by then an engine no longer moves its master weights.
        self.views = self.views or self._weights(engine)
        torch._foreach_lerp_(self.tensors, self.views, 1 - self.decay)

    @torch.no_grad()
    def swap(self, engine: Engine) -> None:
        """Exchange averaged and trained weights."""
        for average, weight in zip(self.tensors, self._weights(engine), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        engine.publish()


class Engine(ABC):
    """One optimiser step is `accumulate` times (`prepare`, forward, `backward`), then `step`.

    Gradients are the mean over ranks and micro-batches. Clipping is by total norm (0: none). The
    caller sets the rates. A step whose gradient is not finite is not taken. The weights are already
    in `module.var` when an engine is built; `create_state` and `pieces` are where the optimiser
    state of a checkpoint is loaded to.
    """

    module: nn.Module  # what to call: the wrapped TrainStep
    optimizer: torch.optim.Optimizer

    def __init__(self, step_module: TrainStep, train: TrainConfig):
        self.accumulate, self.clip, self.betas = train.accumulate, train.clip, train.adam_betas
        self.device = next(step_module.parameters()).device
        self.average: AveragedWeights | None = None
        self.graphs: StepGraphs | None = None
        # Why passes are not recorded although the config asks for it.
        self.no_graphs = ""
        self.skipped = torch.zeros((), device=self.device)
        self.scaler = LossScale(self.device) if step_module.half_dtype == torch.float16 else None

    def prepare(self, last: bool) -> None:
        """Called before the forward pass of a micro-batch.

        `last` marks the last micro-batch of the step, with which gradients are exchanged.
        """
        self.last = last

    def forward(
        self, inputs: Sequence[Tensor | None], stage: int, newest: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch and its cross-entropy (see `TrainStep.forward`). Where the
        passes are recorded, this adds the gradient, too, and `backward` does nothing."""
        if self.graphs:
            return self.graphs(tuple(inputs), stage, newest)
        loss, ce_BL, _ = self.module(*inputs, stage, newest)
        return loss, ce_BL

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch."""

    @abstractmethod
    def step(self) -> StepStats:
        """Reduce and clip the gradients, update the weights, clear the gradients."""

    @abstractmethod
    def held(self) -> list[Piece]:
        """The pieces of master weights and, once they exist, moments that this rank stores."""

    def pieces(self) -> list[Piece]:
        """The pieces of everything in a checkpoint that this rank stores.

        Writing into a tensor sets the value; after weights, call `publish`.
        """
        found = self.held()
        if self.average:
            weights = [piece for piece in found if piece.kind == WEIGHT]
            found += [
                replace(piece, kind="ema", tensor=tensor)
                for piece, tensor in zip(weights, self.average.tensors, strict=True)
            ]
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place of the trained ones, for an evaluation. Every rank
        calls it."""
        assert self.average
        self.average.swap(self)
        try:
            yield
        finally:
            self.average.swap(self)

    @abstractmethod
    def create_state(self, taken: int) -> None:
        """Create the optimiser state as after `taken` steps, with moments of zero."""

    def publish(self) -> None:  # noqa: B027  # nothing to do where the masters are the model's weights
        """Copy changed master weights to the weights of the model, where these are separate."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients sum to the mean over micro-batches, times the loss scale."""
        loss = loss / self.accumulate
        return loss * self.scaler.scale if self.scaler else loss

    def extra_state(self) -> dict[str, Any]:
        """What else resuming needs: the steps not taken, which AdamW did not count, and the loss
        scale."""
        return {
            "skipped_steps": int(self.skipped),
            **({"loss_scale": self.scaler.state()} if self.scaler else {}),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Load `extra_state` from a checkpoint, also of another engine."""
        self.skipped.fill_(state["skipped_steps"])
        if self.scaler and "loss_scale" in state:
            self.scaler.load(state["loss_scale"])

    def choices(self) -> dict[str, str]:
        """What was chosen for the passes, with the reason where it is not what the config asks."""
        asked = self.graphs or self.no_graphs
        off = f"off ({self.no_graphs})"
        return {"graphs": off if self.no_graphs else "on"} if asked else {}

    def set_rates(self, lr: float, weight_decay: float) -> None:
        """Set the rates of the next step."""
        set_rates(self.optimizer, lr, weight_decay)

    def train_step_module(self) -> TrainStep:
        """The TrainStep inside the wrapped module."""
        module = getattr(self.module, "module", self.module)
        assert isinstance(module, TrainStep)
        return module

    def names(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of VAR with their official names."""
        return list(self.train_step_module().var.named_parameters())
