"""The plan of a study: what will run, what it costs, what is held out."""

from __future__ import annotations

import re
from pathlib import Path

from var_scale.cluster.local import process_count
from var_scale.cluster.pipeline import Study, check_machine
from var_scale.config.load import find_config, load
from var_scale.config.schema import Config
from var_scale.cost.from_config import shape_of
from var_scale.cost.time import find_device
from var_scale.errors import UserError
from var_scale.files import canonical_hash, read_json, write_json
from var_scale.progress import duration, progress, say
from var_scale.study.plan import COLUMNS, PlanRow, cells_of, plan_rows, print_plan
from var_scale.train.schedule import Schedule

START_SECONDS = 14.0  # launcher, imports, process group and end of a run, seen on two CPU cores
EXCHANGE_SECONDS = 0.012  # a step's exchange between ranks, seen there too


def plan_table(study: Study, save: bool = False, quiet: bool = False) -> list[PlanRow]:
    """Print the plan, or if `quiet` only make it; with `save` keep it, and the measured step times, as plan.json in the study's folder."""
    configs = [config for config, _ in study.runs()]
    if study.spec.device == "auto":
        check_machine(study)
    steps = [Schedule.of(c.train, c.train_samples).total_steps for c in configs]
    on_this_machine = study.spec.device == "auto"
    world = process_count(configs[0].engine) if on_this_machine else 1
    devices = [c.cluster.devices if c.cluster.gpus_per_node else study.spec.devices for c in configs]
    engine = configs[0].engine
    stage = 3 if engine.name == "fsdp" else engine.zero_stage if engine.name == "deepspeed" else 0
    rows = plan_rows(
        [shape_of(c) for c in configs],
        [n * c.train.batch_size for n, c in zip(steps, configs, strict=True)],
        names=[c.name for c in configs],
        device="cpu" if on_this_machine else study.spec.device,
        devices=world if on_this_machine else devices,
        mfu=None if on_this_machine else study.spec.mfu,
        run_seconds=_measured_seconds(study, configs, steps, world) if on_this_machine else None,
        batch=[c.train.batch_size // c.train.accumulate for c in configs],
        precision="bf16" if configs[0].train.precision in ("bf16", "auto") else "fp32",
        world=world if on_this_machine else devices,
        stage=stage,
    )
    if on_this_machine:
        processes = f"{world} process{'' if world == 1 else 'es'}"
        rests_on = f"a step of each size timed here, {processes} a run; training alone, after images and tokens"
    else:
        device, spec = find_device(study.spec.device), study.spec
        peak = f"{device.peak / 1e12:g} TFLOP/s each, at an ASSUMED {spec.mfu:.0%} of it (study.mfu)"
        each = f"{devices[0]} x" if len(set(devices)) == 1 else f"{min(devices)} to {max(devices)} x"
        rests_on = f"{each} {device.name} a run, {peak}"
    if quiet:
        return rows
    print_plan(rows, rests_on)
    if unused := sorted(set(study.spec.overrides) - set(study.spec.depths)):
        say(f"study.overrides also names depth {', '.join(map(str, unused))}, not among study.depths")
    if not on_this_machine:
        _budget(study, sum(row.seconds * row.devices for row in rows) / 3600)
    if save:
        write_json(study.folder / "plan.json", {"rows": [row.to_json() for row in rows], "steps": _cached(study)})
    return rows


def _on_all(study: Study, hours: float) -> str:
    """How long the whole study takes on so many devices."""
    days = ", ".join(f"{duration(hours * 3600 / n)} on {n}" for n in (8, 64, 256))
    return f"all runs, {hours:,.0f} device-hours, if they fill the devices: {days} {find_device(study.spec.device).name}"


def _budget(study: Study, hours: float) -> None:
    """Say how long the study takes, and refuse what is over its budget."""
    limit = study.spec.budget_hours
    say(_on_all(study, hours))
    if limit and hours > limit:
        raise UserError(f"study.budget_hours: the plan needs {hours:,.0f} device-hours, {limit:,.0f} are allowed; leave out sizes, "
                        "seeds or epochs, or raise it")  # fmt: skip


def _cached(study: Study) -> dict[str, float]:
    """Step times measured before, by identity of the run."""
    path = study.folder / "plan.json"
    return dict(read_json(path, "plan").get("steps", {})) if path.exists() else study.step_times


def _measured_seconds(study: Study, configs: list[Config], steps: list[int], world: int) -> list[float]:
    """Seconds of each run here, from a few timed steps of each size (kept, so that they are timed once).

    A sample of an evaluation costs a third of one in training.
    """
    times = _cached(study)
    keys = [canonical_hash([c.model.model_dump(), c.train.batch_size, c.train.precision, c.tokenizer.patch_nums, world]) for c in configs]
    untimed = {key: config for key, config in zip(keys, configs, strict=True) if key not in times}
    if untimed:
        from var_scale.train.probe import step_seconds

        with progress("time a step of each size", len(untimed), "sizes") as bar:
            for done, (key, config) in enumerate(untimed.items(), 1):
                times[key] = step_seconds(config, world)
                bar.update(done)
    study.step_times = times
    exchange = EXCHANGE_SECONDS if world > 1 else 0.0
    evaluation = [c.train.evals * (c.data.leaves.val_images if c.data.leaves else 0) / c.train.batch_size / 3 for c in configs]
    return [
        START_SECONDS + (n + extra) * times[key] + n * exchange for n, extra, key in zip(steps, evaluation, keys, strict=True)
    ]


PAGE = """# Plans

What the studies of the paper's kind cost, as `var-scale study plan STUDY` prints it: exact FLOPs, memory with activations estimated, and
times for NVIDIA's data-sheet peak at an ASSUMED share of 40 % (`study.mfu`); nothing here was measured. A size's nodes are in the study's
`overrides`, its recipe in `configs/model/`. This page is written by `python -m var_scale.cluster.plan > docs/plans.md`.
"""


def page() -> str:
    """docs/plans.md."""
    parts = [PAGE]
    for name in ("study/var_paper", "study/var_512", "study/isoflop"):
        study = Study(load(name), Path("runs"))
        comment = " ".join(line.lstrip("# ") for line in find_config(name).read_text().splitlines() if line.startswith("# "))
        rows = plan_table(study, quiet=True)
        hours = sum(row.seconds * row.devices for row in rows) / 3600
        lines = [f"## {name}", "", comment, "", f"| {' | '.join(COLUMNS)} | recipe |", f"|{'---|' * len(COLUMNS)}---|"]
        lines += [f"| {' | '.join([*cells_of(row), _recipe(study, row.depth)])} |" for row in rows]
        parts.append("\n".join([*lines, "", f"A{_on_all(study, hours)[1:]}.", ""]))
    return "\n".join(parts)


def _recipe(study: Study, depth: int) -> str:
    """Where a size's recipe is from, as its preset says in its first line."""
    text = find_config(str(study.spec.preset).format(depth=depth)).read_text()
    return re.search(r"Recipe: (\w+)", text).group(1)  # type: ignore[union-attr]


if __name__ == "__main__":
    print(page(), end="")
