"""FSDP2 (`fully_shard`): parameters, gradients and moments sharded over ranks, float32 with autocast inside."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from var_scale.train.engine.base import MOMENT_KEYS, Engine, Moments, StepStats
from var_scale.train.optim import build_optimizer
from var_scale.train.step import TrainStep


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU; a collective when it is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().float().cpu().clone()


class FSDPEngine(Engine):
    """Every block is a unit; what is left (embeddings, head) forms the root unit."""

    def __init__(self, step_module: TrainStep, accumulate: int, clip: float, betas: tuple[float, float]):
        super().__init__(accumulate, clip)
        blocks = step_module.var.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            fully_shard(block)
        fully_shard(step_module)
        self.module: nn.Module = step_module
        self.optimizer = build_optimizer(self.names(), betas)

    def prepare(self, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDPModule

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self) -> StepStats:
        limit = self.clip if self.clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.names()], limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def gather(self) -> tuple[dict[str, torch.Tensor], Moments]:
        keep = dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}
        moments: Moments = {key: {} for key in MOMENT_KEYS}
        for name, p in self.names():
            whole = _whole(p)
            states = [self.optimizer.state[p].get(key) for key in MOMENT_KEYS]
            full = [torch.zeros_like(whole) if state is None else _whole(state) for state in states]
            if keep:
                weights[name] = whole
                for key, state in zip(MOMENT_KEYS, full, strict=True):
                    moments[key][name] = state
        return weights, moments

    def load_moments(self, moments: Moments, step: int) -> None:
        for name, p in self.names():
            assert isinstance(p, DTensor)
            state = {key: distribute_tensor(moments[key][name].to(p.device), p.device_mesh, p.placements) for key in MOMENT_KEYS}
            self.optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **state}
