"""The plan of a study before anything is spent: its runs, their cost, and which of them are held
out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.memory import Precision, count_memory
from var_scale.cost.params import count_params
from var_scale.cost.time import find_device, seconds
from var_scale.files import canonical_hash, read_json, write_json
from var_scale.jobs.local import process_count
from var_scale.progress import duration, print_table, progress, say, short
from var_scale.study.checks import check_data_settings, check_machine, require_budget
from var_scale.study.study import Study
from var_scale.train.schedule import Schedule

START_SECONDS = 14.0
"""Launcher, imports, process group and end of a run, measured on two CPU cores."""
FORK_SECONDS = 1.5
"""The same for a run that a nursery starts."""
EXCHANGE_SECONDS = 0.012
"""The exchange between ranks in one step, measured on the same machine."""

COLUMNS = [
    "run",
    "depth",
    "parameters",
    "N",
    "images",
    "tokens",
    "train FLOP",
    "memory/rank",
    "devices",
    "time",
    "device-hours",
]


MEANING_OF_N = {
    "paper": "N: the paper's parameters, 18 d C^2 (12 d C^2 with shared AdaLN)",
    "total": "N: all parameters",
}


@dataclass(frozen=True)
class PlanRow:
    """One run of the plan."""

    name: str
    depth: int
    width: int
    params_total: int
    n: int
    """N of the laws, as study.count counts it"""
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
    """devices that the run occupies for that time"""
    held_out: bool


@dataclass(frozen=True)
class Plan:
    """The rows of a study's plan and where their times come from."""

    rows: list[PlanRow]
    basis: str
    """a sentence on what the times are computed or measured from"""
    step_seconds: dict[str, float] = field(default_factory=dict)
    """measured time of one step, by the identity of what was timed"""


def plan_table(study: Study, save: bool = False) -> list[PlanRow]:
    """Print the plan of a study; with `save` keep it as plan.json in the study's folder.

    Raises:
        UserError: the study cannot run on this machine, or is over its budget.
    """
    plan = make_plan(study)
    basis = f"{MEANING_OF_N[study.spec.count]}; memory: activations estimated\ntimes: {plan.basis}"
    print_plan(plan.rows, basis, study.spec.parallel)
    named = {*study.spec.overrides, *study.spec.depth_seeds, *study.spec.depth_grid}
    if unused := sorted(named - set(study.spec.depths)):
        say(
            "study.overrides, study.depth_seeds or study.depth_grid name depth "
            f"{', '.join(map(str, unused))}, "
            "which is not in study.depths"
        )
    if study.spec.device != "auto":
        hours = device_hours(plan.rows)
        say(time_on_many(study, hours))
        require_budget(study, hours)
    if save:
        # The plan for a named device times no steps; those that were timed before stay.
        write_json(
            study.folder / "plan.json",
            {
                "rows": [asdict(row) for row in plan.rows],
                "steps": plan.step_seconds or _kept_steps(study),
            },
        )
    return plan.rows


def make_plan(study: Study) -> Plan:
    """The plan for this machine, where steps are timed, or for the device that the study names."""
    check_data_settings(study)
    configs, spec = [config for config, _ in study.runs()], study.spec
    if spec.device != "auto":
        devices = [c.cluster.devices if c.cluster.gpus_per_node else spec.devices for c in configs]
        rows = plan_rows(configs, devices, device=spec.device, mfu=spec.mfu, count=spec.count)
        return Plan(rows, _named_device(study, devices))
    check_machine(study)
    world = process_count(configs[0].engine)
    times = _time_steps(study, configs, world)
    forked = spec.parallel > 1 and world == 1
    expected = [_run_seconds(c, times[_step_key(c, world)], world, forked) for c in configs]
    basis = (
        f"one step of each size, timed here; number of processes per run: {world}; "
        "training only, without images and tokens"
    )
    rows = plan_rows(configs, [world] * len(configs), run_seconds=expected, count=spec.count)
    return Plan(rows, basis, times)


def _named_device(study: Study, devices: Sequence[int]) -> str:
    """What the times on a named device are computed from."""
    device, low, high = find_device(study.spec.device), min(devices), max(devices)
    count = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"{count} x {device.name} per run, {device.peak / 1e12:g} TFLOP/s each, at an ASSUMED "
        f"{study.spec.mfu:.0%} of this peak (study.mfu)"
    )


def time_on_many(study: Study, hours: float) -> str:
    """How long `hours` device-hours take on 8, 64 and 256 of the study's devices."""
    days = ", ".join(f"{duration(hours * 3600 / n)} on {n}" for n in (8, 64, 256))
    return (
        f"all runs, {hours:,.0f} device-hours, if they fill the devices: "
        f"{days} {find_device(study.spec.device).name}"
    )


def _kept_steps(study: Study) -> dict[str, float]:
    """Step times in plan.json, by the identity of what was timed."""
    path = study.folder / "plan.json"
    return dict(read_json(path, "plan").get("steps", {})) if path.exists() else {}


def _step_key(config: Config, world: int) -> str:
    """Identity of what a step's time depends on."""
    return canonical_hash(
        [
            config.model.model_dump(),
            config.train.batch_size,
            config.train.precision,
            config.tokenizer.patch_nums,
            world,
        ]
    )


def _time_steps(study: Study, configs: Sequence[Config], world: int) -> dict[str, float]:
    """Seconds of one step of each size; sizes in plan.json are not timed again."""
    times = _kept_steps(study)
    keyed = {_step_key(config, world): config for config in configs}
    untimed = {key: config for key, config in keyed.items() if key not in times}
    if untimed:
        from var_scale.train.probe import step_seconds

        with progress("time a step of each size", len(untimed), "sizes") as bar:
            for done, (key, config) in enumerate(untimed.items(), 1):
                times[key] = step_seconds(config, world)
                bar.update(done)
    return times


def _run_seconds(config: Config, step: float, world: int, forked: bool) -> float:
    """Expected seconds of a run here: its start, its steps of `step` seconds, its evaluations."""
    steps = Schedule.of(config.train, config.train_samples).total_steps
    # An evaluated sample costs a third of a trained one: it has no backward pass.
    samples = config.data.embedded.val_samples if config.data.embedded else 0
    evaluations = config.train.evals * samples / config.train.batch_size / 3
    exchange = EXCHANGE_SECONDS if world > 1 else 0.0
    start = FORK_SECONDS if forked else START_SECONDS
    return start + (steps + evaluations) * step + steps * exchange


def plan_rows(
    configs: Sequence[Config],
    devices: Sequence[int],
    *,
    device: str = "cpu",
    mfu: float | None = None,
    run_seconds: Sequence[float] | None = None,
    count: str = "paper",
) -> list[PlanRow]:
    """One row per run; the largest of at least two sizes is held out.

    Args:
        devices: number of devices of each run, which is also its number of ranks.
        device: for the expected times, at the share `mfu` of its peak.
        count: the parameters that N counts, paper or total.
        run_seconds: times that follow from measured steps, in place of those of the device.
    """
    rows = []
    for i, (config, ranks) in enumerate(zip(configs, devices, strict=True)):
        shape, train, engine = shape_of(config), config.train, config.engine
        params, flops = count_params(shape), count_flops(shape)
        images = Schedule.of(train, config.train_samples).total_steps * train.batch_size
        micro = max(1, train.batch_size // train.accumulate // ranks)
        precision: Precision = "bf16" if train.precision in ("bf16", "auto") else "fp32"
        stage = engine.sharded_stage
        work = flops.training * images
        rows.append(
            PlanRow(
                name=config.name,
                depth=shape.depth,
                width=shape.width,
                params_total=params.total,
                n=getattr(params, count),
                images=images,
                tokens=flops.tokens * images,
                flops=work,
                flops_6nd=flops.training_6nd * images,
                memory=count_memory(shape, micro, precision, ranks, stage).total,
                seconds=run_seconds[i] if run_seconds else seconds(work, device, ranks, mfu),
                measured=run_seconds is not None,
                devices=ranks,
                held_out=False,
            )
        )
    sizes = {row.n for row in rows}
    return [replace(row, held_out=len(sizes) > 1 and row.n == max(sizes)) for row in rows]


def print_plan(rows: Sequence[PlanRow], basis: str, lanes: int = 1) -> None:
    """Print the plan as a table with its totals; `basis` states what N is and where the times come
    from, and `lanes` how many runs train at the same time here.

    Times that were not measured here come with the device-hours that they cost.
    """
    from rich.table import Table

    hours = not all(row.measured for row in rows)
    shown = [i for i, column in enumerate(COLUMNS) if hours or "device" not in column]
    order = f", {lanes} at a time" if lanes > 1 else ", one after the other"
    table = Table(title=f"plan: {len(rows)} runs" + ("" if hours else order))
    for i in shown:
        table.add_column(COLUMNS[i], justify="right" if i else "left")
    table.add_column("held out", justify="center")
    for row in rows:
        cells = cells_of(row)
        table.add_row(*(cells[i] for i in shown), "yes" if row.held_out else "")
    totals = {
        "run": "all",
        "train FLOP": f"{sum(row.flops for row in rows):.2e}",
        "time": "" if hours else duration(sum(row.seconds for row in rows) / lanes),
        "device-hours": hours_of(rows),
    }
    table.add_section()
    table.add_row(*(totals.get(COLUMNS[i], "") for i in shown), "")
    print_table(table)
    say(basis)


def cells_of(row: PlanRow) -> list[str]:
    """A row as text, one cell for each of COLUMNS."""
    mebi = row.memory / 2**20
    return [
        row.name,
        str(row.depth),
        short(row.params_total),
        short(row.n),
        short(row.images),
        short(row.tokens),
        f"{row.flops:.2e}",
        f"{mebi / 1024:.1f} GiB" if mebi >= 1024 else f"{mebi:.0f} MiB",
        str(row.devices),
        duration(row.seconds),
        hours_of([row]),
    ]


def device_hours(rows: Sequence[PlanRow]) -> float:
    """Device-hours of rows."""
    return sum(row.seconds * row.devices for row in rows) / 3600


def hours_of(rows: Sequence[PlanRow]) -> str:
    """Device-hours of rows as text."""
    hours = device_hours(rows)
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
