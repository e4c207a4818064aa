"""Bytes that ranks exchange per step, and the efficiency that this leaves.

This is a model with stated assumptions, not a measurement. docs/explanation/scaling-out.md shows it
for the official recipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """ASSUMED rates of one GPU, in bytes per second in each direction and in FLOP/s."""

    node: int = 8
    """GPUs per node."""
    inside: float = 360e9
    """80 % of the 450 GB/s of NVLink 4."""
    between: float = 40e9
    """80 % of one adapter of 400 Gb/s per GPU."""
    peak: float = 989e12
    mfu: float = 0.45
    """Share of the peak that a step without any exchange reaches."""
    overlap: float = 0.8
    """Share of the exchange that can run behind the matrix products of the same step, for as long
    as they last."""


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends per optimiser step."""

    inside: float
    """To GPUs of its own node."""
    between: float
    """To other nodes, through its own adapter."""


def exchange(parameters: int, world: int, engine: str, shard: int = 0, node: int = 8) -> Volume:
    """What one rank sends in a step of one micro-batch.

    Gradients and weights travel in float32 on every engine. With w ranks and a tensor of all
    parameters as the unit:

    - ddp, zero0: an all-reduce of the gradients, 2 (w - 1) / w.
    - zero1, zero2: a reduce-scatter of the gradients and an all-gather of the weights, the same
      volume.
    - zero3, fsdp: weights are gathered for the forward and for the backward pass, and gradients are
      reduce-scattered, 3 (w - 1) / w.
    - hsdp: the volume of fsdp within groups of `shard` ranks, and an all-reduce of each rank's
      share between the groups.

    Where ranks of several nodes exchange, as many rings run as a node has GPUs, and each ring
    leaves the node at another GPU. So an adapter carries the share of one ring.

    Raises:
        UserError: the engine is unknown, or `shard` does not divide `world` (code `cost.argument`).
    """
    size = 4.0 * parameters
    if engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"):
        rounds = 3 if engine in ("zero3", "fsdp") else 2
        sent = rounds * (world - 1) / world * size
        return Volume(sent, sent / node if world > node else 0.0)
    if engine != "hsdp" or shard < 1 or world % shard:
        raise UserError(
            f"communication: engine {engine} with shard {shard} on {world} ranks; give ddp, zero0 "
            "to zero3 or fsdp, or hsdp with a shard that divides the number of ranks",
            code="cost.argument",
        )
    groups = world // shard
    within, across = 3 * (shard - 1) / shard * size, 2 * (groups - 1) / groups * size / shard
    return Volume(within, across) if shard <= node else Volume(within, within / node + across)


def efficiency(
    shape: ModelShape,
    batch: int,
    world: int,
    engine: str,
    shard: int = 0,
    cluster: Cluster | None = None,
) -> float:
    """Expected images per second of `world` GPUs, divided by `world` times those of one GPU without
    exchanges, at the global batch `batch`."""
    cluster = cluster or Cluster()
    products = count_flops(shape).training * batch / world / (cluster.peak * cluster.mfu)
    sent = exchange(count_params(shape).total, world, engine, shard, cluster.node)
    inside, between = sent.inside / cluster.inside, sent.between / cluster.between
    # The links of one ring work at the same time; the two exchanges of hsdp follow each other.
    exchanging = inside + between if engine == "hsdp" else max(inside, between)
    visible = max(exchanging * (1 - cluster.overlap), exchanging - cluster.overlap * products)
    return products / (products + visible)
