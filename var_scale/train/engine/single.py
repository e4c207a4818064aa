"""One process, or several with DistributedDataParallel: whole parameters and moments on every rank."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from var_scale.train.engine.base import MOMENT_KEYS, Engine, Moments, StepStats
from var_scale.train.optim import build_optimizer
from var_scale.train.step import TrainStep


class SingleEngine(Engine):
    """No process group."""

    def __init__(self, step_module: TrainStep, accumulate: int, clip: float, betas: tuple[float, float]):
        super().__init__(accumulate, clip)
        self.module: nn.Module = step_module
        self.optimizer = build_optimizer(self.names(), betas)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self) -> StepStats:
        limit = self.clip if self.clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.names()], limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(norm)

    def gather(self) -> tuple[dict[str, torch.Tensor], Moments]:
        weights = {name: p.detach().float().cpu().clone() for name, p in self.names()}
        moments: Moments = {key: {} for key in MOMENT_KEYS}
        for name, p in self.names():
            for key in MOMENT_KEYS:
                state = self.optimizer.state[p].get(key)
                moments[key][name] = torch.zeros_like(weights[name]) if state is None else state.detach().cpu().clone()
        return weights, moments

    def load_moments(self, moments: Moments, step: int) -> None:
        for name, p in self.names():
            state = {key: moments[key][name].to(p.device) for key in MOMENT_KEYS}
            self.optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **state}


class DDPEngine(SingleEngine):
    """DistributedDataParallel: gradients averaged over ranks on the last micro-batch only."""

    def __init__(self, step_module: TrainStep, accumulate: int, clip: float, betas: tuple[float, float]):
        super().__init__(step_module, accumulate, clip, betas)
        device = next(step_module.parameters()).device
        self.module = DistributedDataParallel(
            step_module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def prepare(self, last: bool) -> None:
        assert isinstance(self.module, DistributedDataParallel)
        self.module.require_backward_grad_sync = last
