"""`var-scale study next`: the runs to train next within a budget, from the study's law and the time
that its runs took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from var_scale.config.load import run_config, run_name, variants
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.params import count_params
from var_scale.cost.time import find_device
from var_scale.cost.time import seconds as device_seconds
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.laws.design import Advice, Candidate, advise
from var_scale.laws.law import LawFit
from var_scale.progress import say
from var_scale.records.analyse import StudyResult, fit_study
from var_scale.records.optimum import best_surface, optimum
from var_scale.records.record import RunRecord, read_study
from var_scale.report.sentences import advice_lines, optimum_sentence
from var_scale.study.checks import require_folder
from var_scale.study.study import Study
from var_scale.train.schedule import Schedule

UNIT = "device-hours"


def flops_of(config: Config) -> float:
    """Training FLOPs of a run."""
    steps = Schedule.of(config.train, config.train_samples).total_steps
    return float(count_flops(shape_of(config)).training) * steps * config.train.batch_size


def fitted(study: Study, records: Sequence[RunRecord]) -> StudyResult:
    """All fits of these runs, with the floors, the exclusions and the exceptions of the study."""
    spec = study.spec
    floors = {str(metric): floor for metric, floor in spec.floors.items()}
    return fit_study(counted(study, records), floors=floors, exclude=spec.exclude, keep=spec.keep)


def counted(study: Study, records: Sequence[RunRecord]) -> list[RunRecord]:
    """These runs with N as the study counts it."""
    return [replace(run, counted=f"params_{study.spec.count}") for run in records]


def hours_per_flop(study: Study, result: StudyResult) -> tuple[list[tuple[float, float]], str]:
    """(FLOPs, device-hours per FLOP) of the study's complete runs, and a phrase for their source.

    Without complete runs it is the rate of the device that the study names.

    Raises:
        UserError: no run is complete and no device is named (code `study.cost-unknown`).
    """
    measured = [
        (flops_of(config), hours / flops_of(config))
        for config, record, hours in _started(study, result)
        if record.state == "complete"
    ]
    if measured:
        return sorted(measured), f"measured on {len(measured)} runs of this study"
    device, mfu = study.spec.device, study.spec.mfu
    if device == "auto":
        raise UserError(
            "next: no run is complete, so the cost of a run is unknown; run the study, or set "
            "study.device",
            code="study.cost-unknown",
        )
    rate = device_seconds(1.0, device, 1, mfu) / 3600
    return [(1.0, rate)], f"{find_device(device).name} at an ASSUMED {mfu:.0%} of its peak"


def hours_spent(study: Study, result: StudyResult) -> float:
    """Device-hours that the runs took so far."""
    return sum(hours for *_, hours in _started(study, result))


def _started(study: Study, result: StudyResult) -> Iterator[tuple[Config, RunRecord, float]]:
    """The runs that have started, with their device-hours; without GPUs the machine is the device,
    which `study.parallel` runs share."""
    records = {record.name: record for record in result.records}
    for config, run in study.runs():
        if record := records.get(config.name):
            gpus = config.cluster.gpus_per_node > 0 and run.env.exists()
            devices = int(read_json(run.env)["world_size"]) if gpus else 1 / study.spec.parallel
            yield config, record, record.seconds * devices / 3600


def rate_at(flops: float, seen: Sequence[tuple[float, float]]) -> float:
    """Device-hours per FLOP at `flops`: those of the run with the nearest FLOPs, because small
    models use less of a device's peak."""
    return min(seen, key=lambda pair: abs(math.log(pair[0] / flops)))[1]


def next_runs(study: Study, hours: float, metric: str, depths: Sequence[int]) -> None:
    """Print the advice for a budget of `hours` device-hours.

    Raises:
        UserError: the study has no folder (code `study.folder-missing`), or the metric no law yet
            (code `study.no-law`).
    """
    require_folder(study)
    result = fitted(study, read_study(study.folder))
    if not (law := result.fits[metric, "power"]).converged:
        raise UserError(
            f"{study.folder}: no law of {metric} yet ({law.reason}); run more sizes first",
            code="study.no-law",
        )
    for line in advice(study, result, hours, metric, depths):
        say(line)


def advice(
    study: Study, result: StudyResult, hours: float, metric: str, depths: Sequence[int] = ()
) -> list[str]:
    """The best use of `hours` device-hours, as lines of text.

    These are the runs that narrow the exponent most, the largest affordable model of the study's
    recipe, and, where a surface of size and data was fitted, the best size with its passes over
    the data.
    """
    law = result.law(metric)
    seen, source = hours_per_flop(study, result)
    candidates = [_candidate(study, depth, seen) for depth in depths or candidates_of(study)]
    lines = [
        f"{law.equation}, alpha {law.params['alpha']:.4f} from {len(law.x)} sizes; "
        f"cost of a run: {source}"
    ]
    for form, floor in (("power", "assumed"), ("power_floor", "fitted")):
        fit = result.fits[metric, form]
        if not fit.converged:
            lines.append(f"with E {floor}: no law ({fit.reason})")
            continue
        if form == "power" and law.form != form:
            lines.append(f"with E {floor} ({fit.params['E']:.4g}): the points reject this form")
            continue
        advised = advise(fit, candidates, hours)
        settings = settings_of(study, advised)
        lines.append(
            f"with E {floor} ({fit.params['E']:.4g}) "
            + "; ".join(advice_lines(advised, UNIT))
            + (f"; in the study file: {settings}" if settings else "")
        )
    lines.append(_largest(law, metric, candidates, hours))
    if metric == "loss_avg" and (surface := best_surface(result.surfaces)):
        # The rate of the run whose device-hours are nearest to the budget.
        rate = min(seen, key=lambda pair: abs(math.log(pair[0] * pair[1] / hours)))[1]
        best_run = optimum_sentence(optimum(surface, result.healthy, hours / rate))
        lines.append(f"best size and data for {hours:.3g} {UNIT}, by the surface: {best_run}")
    return lines


def _candidate(study: Study, depth: int, seen: Sequence[tuple[float, float]]) -> Candidate:
    """A seed of this depth with its size N and its cost: that of all points of the study's grid,
    because the study file gives a seed to all of them."""
    base, cost = study.with_files(), 0.0
    for point in variants(study.spec, depth):
        config = run_config(base, depth, study.spec.seeds[0], point)
        flops = point.flops or flops_of(config)
        cost += flops * rate_at(flops, seen)
    size = float(getattr(count_params(shape_of(config)), study.spec.count))
    return Candidate(short_name(depth), size, cost)


def short_name(depth: int) -> str:
    """The name of a depth, such as d06."""
    return run_name(depth, 0).partition("-")[0]


def settings_of(study: Study, advised: Advice) -> str:
    """The advised runs as settings of the study file; empty if there are none."""
    spec, depths = study.spec, sorted(study.spec.depths)
    seeds = {depth: list(spec.depth_seeds.get(depth, spec.seeds)) for depth in depths}
    changed = dict[int, list[int]]()
    for candidate, count in advised.runs:
        depth = int(candidate.name.removeprefix("d"))
        known = seeds.get(depth, [])
        fresh = (seed for seed in range(len(known) + count) if seed not in known)
        changed[depth] = known + [next(fresh) for _ in range(count)]
    if not changed:
        return ""
    every = {**spec.depth_seeds, **changed}
    text = ", ".join(f"{depth}: {list(every[depth])}" for depth in sorted(every))
    new = sorted({*depths, *changed})
    more = f"study.depths={new} " if new != depths else ""
    return f"{more}study.depth_seeds={{{text}}}"


def _largest(law: LawFit, metric: str, candidates: Sequence[Candidate], hours: float) -> str:
    """The largest candidate that the budget pays for, and what the law expects of it."""
    if not (affordable := [c for c in candidates if c.cost <= hours]):
        cheapest = min(candidates, key=lambda c: c.cost)
        return (
            f"no run fits into {hours:.3g} {UNIT}; the smallest, {cheapest.name}, "
            f"takes {cheapest.cost:.3g}"
        )
    best = max(affordable, key=lambda c: c.x)
    at = law.at(best.x)
    return (
        f"the largest that {hours:.3g} {UNIT} pay for among {candidates[0].name} to "
        f"{candidates[-1].name}, trained as the others: {best.name} ({best.cost:.3g}), "
        f"expected {metric} {at.value:.4f} [{at.low:.4f}, {at.high:.4f}]"
    )


def candidates_of(study: Study) -> list[int]:
    """The study's depths, and deeper ones in the same steps up to 1.5 times its largest."""
    depths = sorted(study.spec.depths)
    step = min((b - a for a, b in pairwise(depths)), default=1)
    return [*depths, *range(depths[-1] + step, int(1.5 * depths[-1]) + 1, step)]
