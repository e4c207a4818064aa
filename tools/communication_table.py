"""Writes the tables of docs/explanation/scaling-out.md: bytes that ranks exchange, and the expected
efficiency, for the official recipes."""

from __future__ import annotations

from pathlib import Path

from var_scale.cost.communication import efficiency, exchange
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.files import replace_between
from var_scale.scales import PATCH_NUMS_512

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "scaling-out.md"
START, END = "<!-- tables: begin -->", "<!-- tables: end -->"
LADDER = {16: 768, 20: 768, 24: 768, 30: 1024, 36: 768}
"""Depth and global batch of the official recipes."""
WORLDS = (8, 64, 512)
FORMS = (("zero1", 0), ("zero3", 0), ("hsdp", 8))
"""Engine and ranks per sharding group of the columns; engines of equal volume share one."""


def page() -> str:
    """The page with its tables rebuilt."""
    return replace_between(PAGE.read_text(), START, END, tables())


def shape_at(depth: int) -> ModelShape:
    """The official shape; d36 is the model of 512 pixels with a shared AdaLN."""
    if depth < 36:
        return ModelShape.official(depth)
    return ModelShape.official(depth, patch_nums=PATCH_NUMS_512, shared_aln=True)


def tables() -> str:
    """Volumes and expected efficiencies as Markdown."""
    lines = [
        "Bytes that one rank sends per step on 64 GPUs (8 nodes), within its node / between nodes:",
        "",
        "| model | parameters | DDP, ZeRO 0 to 2 | ZeRO 3, FSDP | HSDP, groups of 8 |",
        "|---|---:|---:|---:|---:|",
    ]
    for depth in LADDER:
        total = count_params(shape_at(depth)).total
        sent = [exchange(total, 64, engine, shard) for engine, shard in FORMS]
        cells = [f"{v.inside / 1e9:.1f} / {v.between / 1e9:.1f} GB" for v in sent]
        lines.append(f"| d{depth} | {total / 1e9:.2f} B | {' | '.join(cells)} |")
    lines += [
        "",
        "Expected efficiency at the official global batch (ZeRO 1 and 2 / ZeRO 3 and FSDP / HSDP "
        "in groups of 8). These values are MODELLED, not measured:",
        "",
        "| model | batch | " + " | ".join(f"{w} GPUs" for w in WORLDS) + " |",
        "|---|---:|" + "---:|" * len(WORLDS),
    ]
    for depth, batch in LADDER.items():
        shape = shape_at(depth)
        cells = [
            " / ".join(
                f"{efficiency(shape, batch, world, engine, shard):.0%}" for engine, shard in FORMS
            )
            for world in WORLDS
        ]
        lines.append(f"| d{depth} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)
