"""Bytes that training needs on each rank.

Exact for parameters, gradients and optimiser state, an estimate for activations.
"""

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
    """float32 master weights and, with sharding or bf16, the copy used in computations"""
    gradients: int
    optimizer: int
    """Adam's two moments in float32"""
    activations: int
    """estimate of what autograd keeps for the backward pass"""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def count_memory(
    shape: ModelShape,
    micro_batch: int,
    precision: Precision = "bf16",
    world: int = 1,
    stage: int = 0,
) -> MemoryCount:
    """Memory of one rank.

    Activations, in elements per token: in each block, inputs and outputs of norms, qkv, attention
    and projections (about 14 C) and the hidden layer of the MLP before and after GELU (2 M); at the
    head, float32 logits and their gradient (2 V). Those of AdaLN are negligible.

    Args:
        micro_batch: images per rank in one forward pass.
        precision: of matrix products.
        world: number of ranks.
        stage: what is sharded, as ZeRO counts: 0 nothing (single, ddp), 1 moments, 2 also
            gradients, 3 also parameters (fsdp).

    Raises:
        UserError: code `cost.argument`.
    """
    if precision not in BYTES:
        raise UserError(
            f"precision: {precision!r} is unknown; use one of {', '.join(BYTES)}",
            code="cost.argument",
        )
    if micro_batch < 1 or world < 1 or stage not in (0, 1, 2, 3):
        raise UserError(
            f"memory: micro_batch {micro_batch} and world {world} must be at least 1, and stage "
            f"{stage} one of 0, 1, 2, 3",
            code="cost.argument",
        )
    n = count_params(shape).total
    share = -(-n // world)
    size = BYTES[precision]
    largest_block = (count_params(shape).blocks + count_params(shape).adaln) // shape.depth
    parameters = 4 * (share if stage >= 3 else n)
    if stage >= 3:
        # One block is used while the next one is gathered.
        parameters += 2 * size * largest_block
    elif precision == "bf16":
        parameters += size * n
    tokens = micro_batch * shape.length
    activations = (
        size * tokens * shape.depth * (14 * shape.width + 2 * shape.mlp_hidden)
        + 4 * tokens * 2 * shape.vocab_size
    )
    return MemoryCount(
        parameters, 4 * (share if stage >= 2 else n), 8 * (share if stage >= 1 else n), activations
    )
