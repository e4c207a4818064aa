"""Bytes that ranks exchange in a step, and what that would cost: a model with stated assumptions, not a measurement.

`python -m var_scale.cost.communication` makes the tables of docs/scaling-out.md anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.files import replace_between
from var_scale.scales import PATCH_NUMS_512

START, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Cluster:
    """ASSUMED rates of one GPU; bytes a second each way, FLOP/s."""

    node: int = 8
    """GPUs of a node"""
    inside: float = 360e9
    """80 % of NVLink 4's 450 GB/s"""
    between: float = 40e9
    """80 % of one 400 Gb/s adapter a GPU"""
    peak: float = 989e12
    mfu: float = 0.45
    """share of the peak that a step without any exchange reaches"""
    overlap: float = 0.8
    """share of the exchange that can run behind the products of the same step, as long as they last"""


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends in an optimiser step."""

    inside: float
    """to GPUs of its own node"""
    between: float
    """to other nodes, through its own adapter"""


def exchange(parameters: int, world: int, engine: str, shard: int = 0, node: int = 8) -> Volume:
    """What one rank sends in a step of one micro-batch; gradients and weights travel in float32 on every engine.

    ddp, zero0: all-reduce of the gradients, 2 (w - 1) / w. zero1, zero2: reduce-scatter of gradients and all-gather of weights, the same
    volume. zero3, fsdp: weights gathered for forward and for backward, gradients reduce-scattered, 3 (w - 1) / w. hsdp: that inside groups
    of `shard` ranks, and an all-reduce of each rank's share between the groups. Where ranks of several nodes exchange, as many rings run as
    a node has GPUs, each leaving the node at another GPU: an adapter carries one ring's share.
    """
    size = 4.0 * parameters
    if engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"):
        rounds = 3 if engine in ("zero3", "fsdp") else 2
        sent = rounds * (world - 1) / world * size
        return Volume(sent, sent / node if world > node else 0.0)
    if engine != "hsdp" or shard < 1 or world % shard:
        raise UserError(f"communication: {engine}, shard {shard} of {world}: take ddp, zero0 to zero3, fsdp, or hsdp and a divisor")
    groups = world // shard
    within, across = 3 * (shard - 1) / shard * size, 2 * (groups - 1) / groups * size / shard
    return Volume(within, across) if shard <= node else Volume(within, within / node + across)


def efficiency(shape: ModelShape, batch: int, world: int, engine: str, shard: int = 0, cluster: Cluster | None = None) -> float:
    """Expected images a second of `world` GPUs over `world` times those of one GPU without exchanges, at a global batch."""
    cluster = cluster or Cluster()
    products = count_flops(shape).training * batch / world / (cluster.peak * cluster.mfu)
    sent = exchange(count_params(shape).total, world, engine, shard, cluster.node)
    inside, between = sent.inside / cluster.inside, sent.between / cluster.between
    exchanging = inside + between if engine == "hsdp" else max(inside, between)  # one ring's links work at the same time
    shown = max(exchanging * (1 - cluster.overlap), exchanging - cluster.overlap * products)
    return products / (products + shown)


LADDER = {16: 768, 20: 768, 24: 768, 30: 1024, 36: 768}
"""depth and global batch of the official recipes"""
WORLDS = (8, 64, 512)
FORMS = (("zero1", 0), ("zero3", 0), ("hsdp", 8))


def shape_at(depth: int) -> ModelShape:
    """The official shape; d36 is the 512-pixel model with shared AdaLN."""
    if depth < 36:
        return ModelShape.official(depth)
    return ModelShape.official(depth, patch_nums=PATCH_NUMS_512, shared_aln=True)


def tables() -> str:
    """Volumes and expected efficiencies as Markdown."""
    lines = ["Bytes that a rank sends in a step at 64 GPUs (8 nodes), inside its node / between nodes:", "",
             "| model | parameters | DDP, ZeRO 0 to 2 | ZeRO 3, FSDP | HSDP, groups of 8 |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    for depth in LADDER:
        total = count_params(shape_at(depth)).total
        cells = []
        for engine, shard in FORMS:
            sent = exchange(total, 64, engine, shard)
            cells.append(f"{sent.inside / 1e9:.1f} / {sent.between / 1e9:.1f} GB")
        lines.append(f"| d{depth} | {total / 1e9:.2f} B | {' | '.join(cells)} |")
    lines += ["", "Expected efficiency at the official global batch (ZeRO 1 and 2 / ZeRO 3 and FSDP / HSDP in groups of 8), MODELLED, not "
              "measured:", "", "| model | batch | " + " | ".join(f"{w} GPUs" for w in WORLDS) + " |",
              "|---|---:|" + "---:|" * len(WORLDS)]  # fmt: skip
    for depth, batch in LADDER.items():
        cells = []
        for world in WORLDS:
            shares = [efficiency(shape_at(depth), batch, world, engine, shard) for engine, shard in FORMS]
            cells.append(" / ".join(f"{share:.0%}" for share in shares))
        lines.append(f"| d{depth} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """The page with its tables made anew."""
    return replace_between(text, START, END, tables())


if __name__ == "__main__":
    page = Path(__file__).resolve().parents[2] / "docs" / "scaling-out.md"
    page.write_text(fill(page.read_text()))
