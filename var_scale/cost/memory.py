"""Bytes that training holds on each rank: exact for parameters and optimiser, an estimate for activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError

Precision = Literal["fp32", "bf16"]
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class MemoryCount:
    """Bytes on one rank."""

    parameters: int
    """float32 master weights and, with sharding or bf16, the working copy"""
    gradients: int
    optimizer: int
    """Adam's two float32 moments"""
    activations: int
    """an estimate: what autograd keeps for the backward pass"""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def count_memory(shape: ModelShape, micro_batch: int, precision: Precision = "bf16", world: int = 1, stage: int = 0) -> MemoryCount:
    """Memory of one rank for `micro_batch` images.

    `stage` is ZeRO's: 0 nothing sharded (single, DDP), 1 moments, 2 and gradients, 3 and parameters (FSDP full shard).
    Activations kept a token and block, in elements: inputs and outputs of norms, qkv, attention, projections (about 14 C),
    MLP hidden before and after GELU (2 M); AdaLN's are small; the head keeps float32 logits and their gradient (2 V).
    """
    if precision not in BYTES:
        raise UserError(f"precision {precision!r} is not known; use one of {', '.join(BYTES)}")
    if micro_batch < 1 or world < 1 or stage not in (0, 1, 2, 3):
        raise UserError(f"memory: micro_batch {micro_batch} and world {world} must be at least 1 and stage {stage} one of 0 1 2 3")
    n = count_params(shape).total
    share = -(-n // world)
    size = BYTES[precision]
    largest_block = (count_params(shape).blocks + count_params(shape).adaln) // shape.depth
    parameters = 4 * (share if stage >= 3 else n)
    if stage >= 3:
        parameters += 2 * size * largest_block  # two gathered blocks are in flight
    elif precision == "bf16":
        parameters += size * n
    tokens = micro_batch * shape.length
    activations = size * tokens * shape.depth * (14 * shape.width + 2 * shape.mlp_hidden) + 4 * tokens * 2 * shape.vocab_size
    return MemoryCount(parameters, 4 * (share if stage >= 2 else n), 8 * (share if stage >= 1 else n), activations)
