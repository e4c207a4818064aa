"""Run folders and tables as records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.raises import raises
from tests.synthetic_study import ladder, record, write_folder
from var_scale.records.gate import gate
from var_scale.records.record import read_run, read_study
from var_scale.records.runs_csv import read_runs_csv, write_runs_csv


def test_run_folder_becomes_the_record(tmp_path: Path) -> None:
    """Every field of a record is read from the files of a run."""
    run = record(4, seed=1, noise=0.01, restarts=2)
    write_folder(run, tmp_path / "study" / run.name)
    assert read_run(tmp_path / "study" / run.name) == run
    write_folder(record(2), tmp_path / "study" / "d2")
    assert [r.depth for r in read_study(tmp_path / "study")] == [2, 4]
    (tmp_path / "study" / "study.yaml").write_text("study: {count: total}\n")
    assert {r.n - r.params_total for r in read_study(tmp_path / "study")} == {0}


def test_run_without_an_end_has_a_record(tmp_path: Path) -> None:
    """A run that trains, with a row that a kill has cut, has no final values but its progress."""
    run = record(4)
    write_folder(run, tmp_path / "r")
    rows = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(rows[:6]) + '\n{"kind": "tr')
    (tmp_path / "r" / "status.json").write_text('{"state": "running", "reason": ""}')
    found = read_run(tmp_path / "r")
    assert math.isnan(found.loss_avg)
    assert found.images == run.images * 3 // 8
    assert found.final_lr_fraction == pytest.approx(1 - 300 / 800)
    assert gate([found]).excluded[0].code == "incomplete"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    """The error names the folder, or the key that is missing."""
    with raises("records.run-missing", str(tmp_path)):
        read_run(tmp_path)
    with raises("records.study-empty", str(tmp_path)):
        read_study(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "x"}')
    with raises("records.run-incomplete", "depth"):
        read_run(tmp_path)


def test_csv_gives_equal_records_back(tmp_path: Path) -> None:
    """Every digit survives a table; a cell of a wrong type is named by line, column and value."""
    runs = ladder((2, 3))
    table = tmp_path / "runs.csv"
    write_runs_csv(runs, table)
    assert read_runs_csv(table) == runs
    table.write_text(table.read_text().replace(",100000,", ",many,", 1))
    with raises("records.table-cell", "line 2", "images", "'many'"):
        read_runs_csv(table)


def test_old_tables_are_read(tmp_path: Path) -> None:
    """runs.csv without the columns that later versions added."""
    runs = [replace(run, peak_lr=0.0) for run in ladder()]
    write_runs_csv(runs, tmp_path / "runs.csv")
    lines = [line.rsplit(",", 6)[0] for line in (tmp_path / "runs.csv").read_text().splitlines()]
    assert lines[0].endswith(",curve")
    (tmp_path / "old.csv").write_text("\n".join(lines) + "\n")
    assert read_runs_csv(tmp_path / "old.csv") == runs


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"step": "x"}, "step"),
        ({"step": None}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": True}, "step"),
        ({}, "step"),
        ({"step": 800, "loss_avg": "x"}, "loss_avg"),
        ({"step": 800, "images": None}, "images"),
        ({"step": 800, "images": -1}, "images"),
        ({"step": 800, "seconds": None}, "seconds"),
        ({"step": 800, "samples": [1]}, "samples"),
        ({"step": 800, "loss_per_scale": None}, "loss_per_scale"),
        ({"step": 800, "err_per_scale": ["y"]}, "err_per_scale"),
        ({"step": 800, "loss_avg": "z" * 1000}, "loss_avg"),
        ({"kind": "restart", "step": "x"}, "step"),
        ({"kind": "train", "step": 800, "lr": {}}, "lr"),
    ],
)
def test_rows_of_metrics_with_wrong_types(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    """One line names the file, the line and the key."""
    write_folder(record(2), tmp_path / "r")
    metrics = tmp_path / "r" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, json.dumps({"kind": "eval"} | row)]) + "\n")
    with raises("file.not-metrics", metrics, f"line {len(lines) + 1}", name):
        read_run(tmp_path / "r")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("run.json", "depth", "x"),
        ("run.json", "seed", None),
        ("run.json", "total_steps", 1.5),
        ("run.json", "peak_lr", "y"),
        ("run.json", "final_lr_fraction", None),
        ("run.json", "shape", []),
        ("status.json", "restarts", "many"),
    ],
)
def test_files_of_a_run_with_wrong_types(
    file: str, key: str, value: object, tmp_path: Path
) -> None:
    write_folder(record(2), tmp_path / "r")
    path = tmp_path / "r" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with raises("records.run-incomplete", path):
        read_run(tmp_path / "r")


def test_odd_files_of_a_run(tmp_path: Path) -> None:
    """A status without a state or that is a list; an evaluation of no image, or with only one
    standard error, is read."""
    write_folder(record(2), tmp_path / "r")
    path = tmp_path / "r" / "status.json"
    text = path.read_text()
    for wrong, code in (("{}", "records.run-incomplete"), ("[1]", "file.not-json")):
        path.write_text(wrong)
        with raises(code, path):
            read_run(tmp_path / "r")
    path.write_text(text)
    row = {"kind": "eval", "step": 800, "final": True, "images": 0, "flops_exact": 5}
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"loss_avg": 4.0, "loss_avg_sem": 0.5}) + "\n")
    run = read_run(tmp_path / "r")
    assert run.images == 0 and run.loss_avg == 4.0
    assert run.sems[1] == 0.5 and math.isnan(run.sems[0])
