"""The plan of a ladder, before anything is spent: sizes, compute, memory, expected time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from var_scale.cost.flops import count_flops
from var_scale.cost.memory import Precision, count_memory
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.cost.time import seconds as device_seconds
from var_scale.errors import UserError
from var_scale.progress import duration, print_table, say


@dataclass(frozen=True)
class PlanRow:
    """One run of the plan."""

    name: str
    depth: int
    width: int
    params_total: int
    params_paper: int
    images: int
    tokens: int
    flops: int
    """exact training FLOPs"""
    flops_6nd: int
    memory: int
    """bytes on each rank, activations estimated"""
    seconds: float
    """expected wall time"""
    measured: bool
    """the time was measured on this machine, not computed from an assumed share of the peak"""
    devices: int
    """devices the run takes for that time"""
    held_out: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan_rows(
    shapes: Sequence[ModelShape], images: int | Sequence[int], *, names: Sequence[str] | None = None, device: str = "h100",
    devices: int | Sequence[int] = 1, mfu: float | None = None,
    run_seconds: Sequence[float] | None = None, micro_batch: int = 1, precision: Precision = "bf16",
    world: int | Sequence[int] = 1, stage: int = 0, batch: Sequence[int] | None = None,
) -> list[PlanRow]:  # fmt: skip
    """One row a shape, in the order given. `images` a run (repeats counted); `run_seconds` replaces the expected times by measured ones.

    The largest size is held out when at least two sizes are planned. `stage` is ZeRO's (3 for FSDP), `world` the ranks of a run; with
    `batch` (samples of a micro-step over all ranks, of each run) each takes its share, else `micro_batch`.
    """
    if not shapes:
        raise UserError("plan: no sizes; give study.depths")
    counts = [images] * len(shapes) if isinstance(images, int) else list(images)
    taken, ranks = ([given] * len(shapes) if isinstance(given, int) else list(given) for given in (devices, world))
    for what, given in (("images", counts), ("names", names), ("run_seconds", run_seconds), ("devices", taken), ("world", ranks)):
        if given is not None and len(given) != len(shapes):
            raise UserError(f"plan: {len(given)} {what} for {len(shapes)} sizes; give one each")
    sizes = [count_params(shape).paper for shape in shapes]
    rows = []
    for i, shape in enumerate(shapes):
        flops = count_flops(shape)
        work = flops.training * counts[i]
        rows.append(
            PlanRow(
                name=names[i] if names else f"d{shape.depth}", depth=shape.depth, width=shape.width,
                params_total=count_params(shape).total, params_paper=sizes[i], images=counts[i], tokens=flops.tokens * counts[i],
                flops=work, flops_6nd=flops.training_6nd * counts[i],
                memory=count_memory(shape, max(1, batch[i] // ranks[i]) if batch else micro_batch, precision, ranks[i], stage).total,
                seconds=run_seconds[i] if run_seconds else device_seconds(work, device, taken[i], mfu),
                measured=run_seconds is not None, devices=taken[i], held_out=len(set(sizes)) > 1 and sizes[i] == max(sizes),
            )
        )  # fmt: skip
    return rows


def print_plan(rows: Sequence[PlanRow], rests_on: str) -> None:
    """Print the plan as a table with its totals; `rests_on` says where the times come from. Times that were not measured here
    come with the device-hours they cost."""
    from rich.table import Table

    hours = not all(row.measured for row in rows)
    table = Table(title=f"plan: {len(rows)} runs" + ("" if hours else ", one after the other"))
    table.add_column("run")
    for column in COLUMNS[1:] if hours else [column for column in COLUMNS[1:] if column not in ("devices", "device-hours")]:
        table.add_column(column, justify="right")
    table.add_column("held out", justify="center")
    for row in rows:
        table.add_row(*(cell for column, cell in zip(COLUMNS, cells_of(row), strict=True) if hours or "device" not in column),
                      "yes" if row.held_out else "")  # fmt: skip
    total, flops = sum(row.seconds for row in rows), sum(row.flops for row in rows)
    table.add_section()
    last = ["", "", hours_of(rows)] if hours else [duration(total)]
    table.add_row("all", "", "", "", "", "", f"{flops:.2e}", "", *last, "")
    print_table(table)
    say(f"N: the paper's parameters, 18 d C^2 (12 d C^2 with shared AdaLN); memory: activations estimated\ntimes: {rests_on}")


COLUMNS = ("run", "depth", "parameters", "N", "images", "tokens", "train FLOP", "memory/rank", "devices", "time", "device-hours")


def cells_of(row: PlanRow) -> list[str]:
    """A row as text, a cell for each of COLUMNS."""
    return [row.name, str(row.depth), short(row.params_total), short(row.params_paper), short(row.images), short(row.tokens),
            f"{row.flops:.2e}", _bytes(row.memory), str(row.devices), duration(row.seconds), hours_of([row])]  # fmt: skip


def hours_of(rows: Sequence[PlanRow]) -> str:
    hours = sum(row.seconds * row.devices for row in rows) / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def short(value: float) -> str:
    """18.5 M, 2.01 B, 871 M: three digits and a letter."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
