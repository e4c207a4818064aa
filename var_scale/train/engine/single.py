"""One process, or several with DistributedDataParallel: every rank stores all parameters and
moments."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from var_scale.config.schema import TrainConfig
from var_scale.train.engine.base import MOMENTS, WEIGHT, Engine, Piece, StepStats, guard
from var_scale.train.optim import build_optimizer
from var_scale.train.step import TrainStep


def whole_pieces(
    names: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[Piece]:
    """The pieces of an engine whose ranks all store everything."""
    copy = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = []
    for name, p in names:
        tensors = {
            WEIGHT: p.detach(),
            **{key: optimizer.state[p][key] for key in MOMENTS if key in optimizer.state[p]},
        }
        found += [
            Piece(kind, name, tuple(p.shape), 0, tensor.view(-1), copy)
            for kind, tensor in tensors.items()
        ]
    return found


def zero_state(parameter: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """The state of AdamW for one parameter, with moments of zero."""
    return {
        "step": torch.tensor(float(step), device=parameter.device),
        **{key: torch.zeros_like(parameter) for key in MOMENTS},
    }


class SingleEngine(Engine):
    """No process group."""

    def __init__(self, step_module: TrainStep, train: TrainConfig):
        super().__init__(step_module, train)
        self.module: nn.Module = step_module
        self.optimizer = build_optimizer(self.names(), self.betas)

    def backward(self, loss: torch.Tensor) -> None:
        if not self.graphs:
            self.scaled(loss).backward()

    def step(self) -> StepStats:
        stats = guard([p for _, p in self.names()], self.optimizer, self.clip, self.scaler)
        self.optimizer.step()
        # A recorded pass adds to the same memory in every step.
        self.optimizer.zero_grad(set_to_none=not self.graphs)
        return stats

    def held(self) -> list[Piece]:
        return whole_pieces(self.names(), self.optimizer)

    def create_state(self, taken: int) -> None:
        self.optimizer.state.clear()  # in a rollback: free the old moments before making new ones
        for _, p in self.names():
            self.optimizer.state[p] = zero_state(p.detach(), taken)


class DDPEngine(SingleEngine):
    """DistributedDataParallel; gradients are averaged over ranks in the last micro-batch only."""

    def __init__(self, step_module: TrainStep, train: TrainConfig):
        super().__init__(step_module, train)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.module = DistributedDataParallel(
            step_module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def prepare(self, last: bool) -> None:
        assert isinstance(self.module, DistributedDataParallel)
        self.module.require_backward_grad_sync = last
