"""Grids of runs, the plan of a study, its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.raises import raises
from tests.study.mini import mini
from var_scale.config.load import load
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.progress import short
from var_scale.scales import length
from var_scale.study.plan import plan_rows, plan_table, print_plan
from var_scale.study.study import Study


def test_grids(tmp_path: Path) -> None:
    """All combinations, each with its own name and keys: engines by preset, epochs by FLOPs, and a
    share of the data."""
    grid = (
        "study.grid={train.base_lr: [0.01, 0.02], model.kernels: [on, off], engine: [ddp, zero2]}"
    )
    runs = mini(tmp_path, grid, "study.depths=[1,2]", "study.seeds=[0,1]").runs()
    assert len(runs) == 32 and len({run.path for _, run in runs}) == 32
    one = next(
        config
        for config, run in runs
        if run.path.name == "d02-s1-base_lr_0.02-kernels_off-engine_zero2"
    )
    assert (one.train.base_lr, one.model.kernels, one.train.seed) == (0.02, "off", 1)
    assert (one.engine.name, one.engine.zero_stage) == ("deepspeed", 2)
    runs = mini(
        tmp_path, "study.flops=[1e9,4e9]", "study.grid={data.fraction: [0.5]}", "study.depths=[1,3]"
    ).runs()
    assert [run.path.name for _, run in runs][:2] == [
        "d01-s0-fraction_0.5-c1e09",
        "d01-s0-fraction_0.5-c4e09",
    ]
    for config, _ in runs:
        flops = (
            count_flops(shape_of(config)).training
            * config.train_samples
            * (config.train.epochs or 0)
        )
        assert (
            flops == pytest.approx(1e9 if "1e09" in config.name else 4e9)
            and config.train_samples == 256
            and config.train.steps is None
        )
    steps = mini(tmp_path, "study.grid={train.epochs: [1, 2]}", "study.depths=[1]").runs()
    assert [(config.train.epochs, config.train.steps) for config, _ in steps] == [
        (1, None),
        (2, None),
    ]
    for wrong, key, code in (
        ("{train.base_lr: []}", "grid.train.base_lr", "config.value"),
        ("{model.depth: [1]}", "grid.model.depth", "config.value"),
        ("{train.nonsense: [1]}", "train.nonsense", "config.unknown-key"),
    ):
        with raises(code, key):
            mini(tmp_path, f"study.grid={wrong}").runs()


def test_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan on named devices counts the devices of each size's nodes, states how long all runs
    take on more of them, and refuses what is over the budget."""
    paper = ["cluster=h100-8", "study.overrides={30: {cluster.nodes: 8}}", "study.depths=[16,30]"]
    rows = plan_table(Study(load("study/var_paper", paper), tmp_path))
    assert [row.devices for row in rows] == [16, 64] and rows[1].memory < rows[0].memory * 4
    assert "on 8," in (out := capsys.readouterr().out) and "on 256 NVIDIA H100" in out
    with raises("study.over-budget", "study.budget_hours", " 100;"):
        plan_table(Study(load("study/var_paper", [*paper, "study.budget_hours=100"]), tmp_path))


def test_the_rows_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest of several sizes is held out; a plan without measured times is printed with
    device-hours."""
    configs = [config for config, _ in mini(tmp_path, "study.depths=[2,4]").runs()]
    rows = plan_rows(configs, [1, 1])
    assert [row.held_out for row in rows] == [False, True]
    assert rows[0].images == 24 * 16
    assert rows[0].tokens == 24 * 16 * length(configs[0].tokenizer.patch_nums)
    assert rows[1].flops > 4 * rows[0].flops
    assert plan_rows(configs, [2, 2])[0].seconds == rows[0].seconds / 2
    print_plan(rows, "a guess")
    out = capsys.readouterr().out
    assert "a guess" in out and "device-hours" in out and "d04-s0" in out
    (timed,) = plan_rows(configs[:1], [1], run_seconds=[12.5])
    assert timed.seconds == 12.5 and timed.measured and not timed.held_out
    print_plan([timed], "timed")
    assert "device-hours" not in capsys.readouterr().out
    assert (short(18492580), short(2010020356), short(42)) == ("18.5 M", "2.01 B", "42")


def test_grids_of_single_depths(tmp_path: Path) -> None:
    """Large sizes can have fewer points of the grid than small ones."""
    few = "study.depth_grid={2: {train.steps: [8]}}"
    study = mini(tmp_path, "study.depths=[1,2]", "study.grid={train.steps: [4, 8]}", few)
    found = [(config.name, config.train.steps) for config, _ in study.runs()]
    assert found == [("d01-s0-steps_4", 4), ("d01-s0-steps_8", 8), ("d02-s0-steps_8", 8)]
    for value in ("{2: {train.epochs: [1]}}", "{2: {train.steps: []}}"):
        with raises("config.value", "depth_grid" if "epochs" in value else "train.steps"):
            load("study/tiny", ["study.grid={train.steps: [4]}", f"study.depth_grid={value}"])


def test_seeds_of_single_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small sizes can have more seeds than large ones; the plan adds the times of both lanes."""
    seeds = ["study.depths=[1,2,3]", "study.seeds=[4]", "study.depth_seeds={1: [0, 1], 3: [2]}"]
    study = mini(tmp_path, *seeds)
    names = [run.path.name for _, run in study.runs()]
    assert names == ["d01-s0", "d01-s1", "d02-s4", "d03-s2"]
    rows = plan_rows([config for config, _ in study.runs()], [1] * 4, run_seconds=[60.0] * 4)
    print_plan(rows, "a test", 2)
    shown = capsys.readouterr().out
    assert "2 at a time" in shown and "2 min 00 s" in shown and "4 min" not in shown
    for value in ("{1: []}", "{1: [2, 2]}", "{1: [-1]}"):
        with raises("config.value", "depth_seeds"):
            load("study/tiny", [f"study.depth_seeds={value}"])
