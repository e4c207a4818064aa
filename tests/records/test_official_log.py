"""Logs of the official trainer that are cut, damaged or not finite, and names of its runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.raises import raises
from tests.records.test_sources import official
from var_scale.records.collect import collect
from var_scale.records.gate import gate
from var_scale.records.runs_csv import read_runs_csv
from var_scale.records.sources import read_all, read_records

ALL = list(range(1, 31))


def test_a_cut_row_in_the_middle(tmp_path: Path) -> None:
    """A kill cut a row; the next attempt writes on in its line, or in the next one."""
    log = official(tmp_path / "a", ALL) / "log.txt"
    (whole,) = read_records(str(log))
    text = log.read_text()
    place = text.index("{'it': None, 'ep': '12/30'")
    for cut in ("{'it': None, 'ep': '12/3", "{'it': None, 'ep': '12/30', 'lr': ", "{"):
        for join in ("", "\n"):
            log.write_text(text[:place] + cut + join + text[place:])
            assert read_records(str(log)) == [whole], (cut, join)
    log.write_text(text[: place - 1] + text[place:])  # two whole rows in one line
    assert read_records(str(log)) == [whole]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("--depth=16", "--depth=x", ["--depth=x"]),
        ("--depth=16", "--depth=0", ["--depth=0"]),
        ("--depth=16", "--depth=1_6", ["--depth=1_6"]),
        ("--depth=16", "--deep=16", ["no --depth"]),
        ("--depth=16", "--depth=16 --pn=1_x", ["--pn=1_x"]),
        ("--depth=16", "--depth=16 --pn=512_", ["--pn=512_"]),
        ("--wpe=0.1", "--wpe=y", ["--wpe=y"]),
        ("'ep': '7/30'", "'ep': 'x'", ["line 14", "ep", "'x'"]),
        ("'ep': '7/30'", "'ep': '0/30'", ["line 14", "ep", "'0/30'"]),
        ("'vL_mean': 6.7,", "'vL_mean': 'low',", ["epoch 30", "vL_mean", "'low'"]),
        ("'vL_tail': 5.7,", "", ["epoch 30", "vL_tail"]),
    ],
)
def test_damaged_logs(old: str, new: str, names: list[str], tmp_path: Path) -> None:
    """Each has its own message, which names the file and what is wrong in it."""
    log = official(tmp_path, ALL) / "log.txt"
    text = log.read_text()
    assert text.count(old) == 1
    log.write_text(text.replace(old, new))
    with raises("records.official-log", log, *names):
        read_records(str(log))


def test_a_log_without_an_epoch(tmp_path: Path) -> None:
    log = official(tmp_path, []) / "log.txt"
    for row in ("", "{'it': None, 'ep': '1/3"):
        log.write_text(log.read_text() + row)
        with raises("records.official-log", log, "no whole epoch"):
            read_records(str(log))


def test_the_last_rows_decide_the_state(tmp_path: Path) -> None:
    """A loss that is infinite at first is no divergence; a validation loss that ends infinite is
    one."""
    log = official(tmp_path, ALL) / "log.txt"
    (whole,) = read_records(str(log))
    text = log.read_text()
    log.write_text(text.replace("'L_mean': 1.0", "'L_mean': inf", 1))
    assert read_records(str(log)) == [whole] and whole.state == "complete"
    log.write_text(text.replace("'vL_mean': 6.8,", "'vL_mean': inf,"))
    (middle,) = read_records(str(log))
    assert middle == replace(whole, curve=(whole.curve[0], whole.curve[2]))
    log.write_text(text.replace("'vL_mean': 6.7,", "'vL_mean': inf,"))
    (run,) = read_records(str(log))
    assert run.state == "diverged" and "epoch 30" in run.reason and math.isnan(run.loss_avg)
    assert gate([run]).excluded[0].code == "diverged"


def other_numbers(folder: Path) -> Path:
    """The same run with another loss at its end."""
    log = official(folder, ALL) / "log.txt"
    log.write_text(log.read_text().replace("'vL_mean': 6.7,", "'vL_mean': 6.6,"))
    return folder


def test_output_folders_of_one_name(tmp_path: Path) -> None:
    """Parents make the names distinct, as many as that takes; a third run keeps its short name."""
    one = official(tmp_path / "a" / "var" / "out" / "local_output", ALL)
    two = other_numbers(tmp_path / "b" / "var" / "out" / "local_output")
    three = other_numbers(tmp_path / "c" / "last" / "local_output")
    runs = {run.name: run.loss_avg for run in read_all([str(one), str(two), str(three)])}
    assert runs == {
        "official-d16-a-var-out": pytest.approx(6.7),
        "official-d16-b-var-out": pytest.approx(6.6),
        "official-d16-last": pytest.approx(6.6),
    }
    for folder in (one, two):
        log = folder / "log.txt"
        log.write_text(log.read_text().replace('"name": "text"', '"name": "mine"'))
    names = [run.name for run in read_all([str(one), str(two / "log.txt")])]
    assert names == ["mine-a-var-out", "mine-b-var-out"]


def test_one_output_folder_with_other_numbers(tmp_path: Path) -> None:
    """A log and a copy of it in the same folder that differ are one run twice."""
    one = other_numbers(tmp_path / "out")
    (one / "copy.txt").write_text((one / "log.txt").read_text().replace("6.6,", "6.5,"))
    with raises("records.run-twice", one):
        read_all([str(one), str(one / "copy.txt")])


def test_two_folders_with_the_same_numbers(tmp_path: Path) -> None:
    """They are one row, and one line says so; the same folder twice needs none. A run without an
    end has no values, and equals itself."""
    folders = [official(tmp_path / name / "out", ALL[:15]) for name in "ab"]
    lines = collect(list(map(str, folders)), tmp_path / "r.csv", None, 1000)
    assert len(read_runs_csv(tmp_path / "r.csv")) == 1
    (line,) = [line for line in lines if "same numbers" in line]
    assert str(folders[0]) in line and str(folders[1]) in line
    lines = collect([str(folders[0])] * 2, tmp_path / "s.csv", None, 1000)
    assert not any("same numbers" in line for line in lines)
    assert len(read_all([str(tmp_path / "r.csv"), str(tmp_path / "s.csv")])) == 1
