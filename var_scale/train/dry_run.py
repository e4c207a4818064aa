"""Build a config as one rank of any world, without devices and memory, to learn what the rank would
hold."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from var_scale.config.schema import Config
from var_scale.cost.from_config import shape_of
from var_scale.cost.memory import MemoryCount, count_memory
from var_scale.data.order import rank_slice
from var_scale.model.load import build_model, new_tokenizer
from var_scale.train.engine.fsdp import FSDPEngine
from var_scale.train.step import TrainStep


@dataclass(frozen=True)
class DryRun:
    """One rank."""

    memory: MemoryCount
    micro_batch: int
    parameters: int
    """of the complete model, counted on the built model"""
    held: int
    """master weights on this rank"""


def dry_run(config: Config, world: int) -> DryRun:
    """Build rank 0 of `world` ranks.

    FSDP is built with torch's fake process group; for DeepSpeed the shares follow from the stage.

    Raises:
        UserError: the batch does not divide, or the mesh does not fit.
    """
    engine = config.engine
    part = rank_slice(config.train.batch_size, world, 0, config.train.accumulate, 0)
    micro = part.stop - part.start
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    meta = torch.device("meta")
    with meta:
        tokenizer = new_tokenizer(config.tokenizer)
        var = build_model(config, tokenizer, meta)
    total = sum(p.numel() for p in var.parameters())
    stage = engine.sharded_stage
    shards, held = world, total
    if engine.name == "fsdp":
        shards = engine.shard or world
        held = _shard(config, TrainStep(var, tokenizer.quantize, config.train, precision), world)
    elif stage:
        held = -(-total // world)
    memory = count_memory(
        shape_of(config), micro, "fp32" if precision == "fp32" else "bf16", shards, stage
    )
    return DryRun(memory, micro, total, held)


def _shard(config: Config, module: TrainStep, world: int) -> int:
    """Master weights of rank 0 after fully_shard."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            engine = FSDPEngine(module, config.train, config.engine)
            return sum(piece.tensor.numel() for piece in engine.pieces())
        finally:
            dist.destroy_process_group()
