"""`var-scale study next`: which runs of a study to make next within a budget, from its law and what its runs took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from var_scale.cluster.pipeline import Study
from var_scale.config.load import run_config, run_name
from var_scale.config.schema import Config
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.cost.params import count_params
from var_scale.cost.time import find_device
from var_scale.cost.time import seconds as device_seconds
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.progress import say
from var_scale.run_folder import RunFolder
from var_scale.study.analyse import StudyResult, fit_study
from var_scale.study.laws import LawFit
from var_scale.study.next_runs import Candidate, advise
from var_scale.study.optimum import best_surface, optimum, sentence
from var_scale.study.record import read_study
from var_scale.train.schedule import Schedule


def flops_of(config: Config) -> float:
    """Training FLOPs of a run."""
    steps = Schedule.of(config.train, config.train_samples).total_steps
    return float(count_flops(shape_of(config)).training) * steps * config.train.batch_size


def hours_per_flop(study: Study) -> tuple[list[tuple[float, float]], str]:
    """(FLOPs, device-hours a FLOP) of the study's complete runs, and where that is from; from the plan's device where there are none."""
    seen = []
    for config, run in study.runs():
        status = run.status()
        if status["state"] == "complete":
            seen.append((flops_of(config), _hours(config, run) / flops_of(config)))
    if seen:
        return sorted(seen), f"measured on {len(seen)} runs of this study"
    if study.spec.device == "auto":
        raise UserError("next: no run is complete, so nothing tells what a run costs; run the study, or name study.device")
    device, mfu = study.spec.device, study.spec.mfu
    rate = device_seconds(1.0, device, 1, mfu) / 3600
    return [(1.0, rate)], f"{find_device(device).name} at an ASSUMED {mfu:.0%} of its peak"


def hours_spent(study: Study) -> float:
    """Device-hours that the runs took so far."""
    return sum(_hours(config, run) for config, run in study.runs())


def _hours(config: Config, run: RunFolder) -> float:
    """Device-hours that a run took so far."""
    seconds = max((float(row.get("seconds", 0)) for row in run.read_metrics()), default=0.0)
    return seconds * _devices(config, run) / 3600


def _devices(config: Config, run: RunFolder) -> int:
    """GPUs that a run took, or without GPUs 1: the machine."""
    world = int(read_json(run.env)["world_size"]) if run.env.exists() else 1
    return world if config.cluster.gpus_per_node else 1


def cost_of(flops: float, seen: Sequence[tuple[float, float]]) -> float:
    """Device-hours of so many FLOPs, at the rate of the run whose FLOPs are nearest; small models are slower a FLOP."""
    return flops * min(seen, key=lambda pair: abs(math.log(pair[0] / flops)))[1]


def next_runs(study: Study, hours: float, metric: str, depths: Sequence[int]) -> None:
    """Print the advice for a budget of `hours`."""
    result = fit_study(read_study(study.folder), floors={str(m): floor for m, floor in study.spec.floors.items()},
                       exclude=study.spec.exclude, keep=study.spec.keep)  # fmt: skip
    if not (law := result.fits[metric, "power"]).converged:
        raise UserError(f"{study.folder}: no law of {metric} yet ({law.reason}); run more sizes first")
    for line in advice(study, result, hours, metric, depths):
        say(line)


def advice(study: Study, result: StudyResult, hours: float, metric: str, depths: Sequence[int] = ()) -> list[str]:
    """The runs that narrow the exponent most within `hours`, and the best models that they could pay instead: the largest of the study's
    recipe, and where there is a surface of size and data the best size with its passes over the data."""
    law: LawFit = result.fits[metric, "power"]
    base, (seen, source) = study.with_files(), hours_per_flop(study)
    unit = "device-hours"
    candidates = []
    for depth in depths or candidates_of(study):
        config = run_config(base, depth, study.spec.seeds[0])
        candidates.append(Candidate(run_name(depth, 0)[:3], float(count_params(shape_of(config)).paper), cost_of(flops_of(config), seen)))
    lines = [f"{law.equation}, alpha {law.params['alpha']:.4f} from {len(law.x)} sizes; cost of a run: {source}"]
    for form in ("power", "power_floor"):
        fitted = result.fits[metric, form]
        if not fitted.converged:
            lines.append(f"with E fitted: no law ({fitted.reason})")
            continue
        lines.append(f"with E {'assumed' if form == 'power' else 'fitted'} ({fitted.params['E']:.4g}) "
                     + "; ".join(advise(fitted, candidates, hours).lines(unit)))  # fmt: skip
    affordable = [c for c in candidates if c.cost <= hours]
    if affordable:
        best = max(affordable, key=lambda c: c.x)
        at = law.at(best.x)
        expected = f"{at.value:.4f} [{at.low:.4f}, {at.high:.4f}]"
        among = f"the largest that {hours:.3g} {unit} pay among {candidates[0].name} to {candidates[-1].name}, trained as the others"
        lines.append(f"{among}: {best.name} ({best.cost:.3g}), expected {metric} "
                     f"{expected}")  # fmt: skip
    else:
        cheapest = min(candidates, key=lambda c: c.cost)
        lines.append(f"no run fits {hours:.3g} {unit}; the smallest, {cheapest.name}, takes {cheapest.cost:.3g}")
    if metric == "loss_avg" and (surface := best_surface(result.surfaces)):
        rate = min(seen, key=lambda pair: abs(math.log(pair[0] * pair[1] / hours)))[1]
        best_run = sentence(optimum(surface, result.healthy, hours / rate))
        lines.append(f"best size and data for {hours:.3g} {unit}, by the surface: {best_run}")
    return lines


def candidates_of(study: Study) -> list[int]:
    """The study's depths and those up to half as deep again."""
    depths = sorted(study.spec.depths)
    step = min((b - a for a, b in pairwise(depths)), default=1)
    return [*depths, *range(depths[-1] + step, int(1.5 * depths[-1]) + 1, step)]
