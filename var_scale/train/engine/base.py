"""The seam between the loop and what carries a step out (contract 5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from var_scale.train.optim import set_rates
from var_scale.train.step import TrainStep

Moments = dict[str, dict[str, torch.Tensor]]  # {"exp_avg": {name: tensor}, "exp_avg_sq": {name: tensor}}
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepStats:
    """What one optimiser step reports. grad_norm is before clipping; a tensor, so that reading it is the caller's choice."""

    grad_norm: torch.Tensor | float


class Engine(ABC):
    """One optimiser step is `accumulate` times (`prepare`, forward, `backward`), then `step`.

    Gradients are the mean over ranks and micro-batches; clipping is by total norm (0: none); rates are set by the caller.
    Weights are already in `module.var` when an engine is built; optimiser moments are given to `load_moments` after it.
    """

    module: nn.Module  # what to call: the wrapped TrainStep
    optimizer: torch.optim.Optimizer

    def __init__(self, accumulate: int, clip: float):
        self.accumulate, self.clip = accumulate, clip

    def prepare(self, last: bool) -> None:
        """Before the forward of a micro-batch; `last` marks the last one of the step, whose gradients are exchanged."""
        self.last = last

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradient."""

    @abstractmethod
    def step(self) -> StepStats:
        """Reduce, clip, update, clear the gradients."""

    @abstractmethod
    def gather(self) -> tuple[dict[str, torch.Tensor], Moments]:
        """Float32 master weights and moments by official parameter name, whole, on the CPU of rank 0 (others: may be empty).
        Every rank must call it."""

    @abstractmethod
    def load_moments(self, moments: Moments, step: int) -> None:
        """Set the optimiser state after `step` steps. Every rank must call it with whole tensors."""

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
