"""FSDP2 (`fully_shard`): parameters, gradients and moments are sharded over ranks, in float32 with
autocast inside."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from var_scale.config.schema import EngineConfig, TrainConfig
from var_scale.errors import UserError
from var_scale.train.engine.base import MOMENTS, WEIGHT, Piece
from var_scale.train.engine.single import SingleEngine
from var_scale.train.step import TrainStep


def build_mesh(device: torch.device, shard: int) -> DeviceMesh:
    """A mesh of all ranks, or of replicated groups of `shard` ranks that share one copy (HSDP)."""
    world = dist.get_world_size()
    kind = "cpu" if device.type == "meta" else device.type  # meta: a dry run
    if shard in (0, world):
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    if world % shard:
        raise UserError(
            f"engine.shard: {shard} does not divide {world} processes; set it to a divisor, or to "
            "0 for one group of all",
            code="train.shard-divide",
        )
    return init_device_mesh(kind, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


class FSDPEngine(SingleEngine):
    """Every block is a unit; the rest (embeddings, head) forms the root unit."""

    def __init__(self, step_module: TrainStep, train: TrainConfig, engine: EngineConfig):
        self.mesh = build_mesh(next(step_module.parameters()).device, engine.shard)
        blocks = step_module.var.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=engine.reshard_after_forward)
        fully_shard(step_module, mesh=self.mesh, reshard_after_forward=engine.reshard_after_forward)
        super().__init__(step_module, train)

    def prepare(self, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]  # FSDPModule

    def publish(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves parameters gathered, with the old weights

    def held(self) -> list[Piece]:
        self.publish()
        copy = (
            (self.mesh.get_local_rank("replicate"), self.mesh.size(0))
            if self.mesh.ndim == 2
            else (0, 1)
        )
        rank, parts = self.mesh.get_local_rank("shard"), self.mesh.size(self.mesh.ndim - 1)
        found = []
        for name, p in self.names():
            # fully_shard splits the first dimension as torch.chunk does.
            rows = -(-p.shape[0] // parts)
            start = min(rank * rows, p.shape[0]) * math.prod(p.shape[1:])
            state = self.optimizer.state[p]
            for kind, tensor in {
                WEIGHT: p.detach(),
                **{key: state[key] for key in MOMENTS if key in state},
            }.items():
                assert isinstance(tensor, DTensor)
                found.append(
                    Piece(kind, name, tuple(p.shape), start, tensor.to_local().view(-1), copy)
                )
        return found
