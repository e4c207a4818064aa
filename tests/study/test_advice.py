"""What to train next: the advice can be written into the study file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.study.mini import mini
from tests.synthetic_study import record
from var_scale.config.load import parse_override
from var_scale.laws.design import Advice, Candidate
from var_scale.records.analyse import fit_study
from var_scale.study.advice import _candidate, hours_spent, settings_of
from var_scale.study.study import Study


def advised(**runs: int) -> Advice:
    """Advice of `count` runs of each depth by name."""
    chosen = tuple((Candidate(name, 1e6, 1.0), count) for name, count in runs.items())
    return Advice(chosen, 1.0, 0.1, 0.05)


@pytest.mark.parametrize(
    ("given", "runs", "more"),
    [
        (["study.depths=[1,5]"], {"d01": 3, "d05": 1}, {1: 4, 5: 2}),
        (["study.depths=[1,2]", "study.seeds=[0,7]"], {"d02": 1, "d03": 2}, {1: 2, 2: 3, 3: 2}),
        (["study.depths=[1,2]", "study.depth_seeds={1: [4]}"], {"d01": 1}, {1: 2, 2: 1}),
    ],
)
def test_advice_as_settings(
    given: list[str], runs: dict[str, int], more: dict[int, int], tmp_path: Path
) -> None:
    """With the settings the study has its former runs and the advised ones, and no others."""
    before = mini(tmp_path, *given)
    settings = settings_of(before, advised(**runs)).replace(" study", "\nstudy").splitlines()
    assert all(parse_override(text) for text in settings)
    after = mini(tmp_path, *given, *settings)

    def names(study: Study) -> set[str]:
        return {config.name for config, _ in study.runs()}

    assert names(before) < names(after)
    counts = {
        depth: sum(name.startswith(f"d{depth:02d}-") for name in names(after)) for depth in more
    }
    assert counts == more and len(names(after)) == sum(more.values())


def test_nothing_is_advised(tmp_path: Path) -> None:
    assert settings_of(mini(tmp_path), advised()) == ""


def test_a_seed_costs_all_points_of_the_grid(tmp_path: Path) -> None:
    """The study file gives a seed to every point."""
    one = mini(tmp_path, "study.depths=[1,2]")
    grid = mini(tmp_path, "study.depths=[1,2]", "study.grid={train.steps: [24, 12, 12000]}")
    rate = [(1.0, 1.0)]
    single, whole = _candidate(one, 2, rate), _candidate(grid, 2, rate)
    assert whole.cost == pytest.approx(single.cost * (24 + 12 + 12000) / 24)
    assert whole.x == single.x and whole.name == "d02"


def test_runs_that_share_the_machine_share_its_hours(tmp_path: Path) -> None:
    """Two runs at a time on one machine for an hour are one hour of the machine."""
    records = [replace(record(depth), seconds=3600.0) for depth in (1, 2)]
    for parallel in (1, 2):
        study = mini(tmp_path, "study.depths=[1,2]", f"study.parallel={parallel}")
        names = [config.name for config, _ in study.runs()]
        runs = [replace(run, name=name) for run, name in zip(records, names, strict=True)]
        assert hours_spent(study, fit_study(runs)) == pytest.approx(2 / parallel)
