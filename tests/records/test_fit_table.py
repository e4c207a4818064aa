"""`fit` of a study or of a table follows the same rules as the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.raises import raises
from tests.synthetic_study import record
from var_scale.records.analyse import fit_study
from var_scale.records.compare_tables import fit_tables
from var_scale.records.record import RunRecord
from var_scale.records.runs_csv import write_runs_csv
from var_scale.records.table import FitOptions, fit_table

LENGTHS = {0.25: 1.08, 0.5: 1.03, 1.0: 1.0}
"""Share of the longest run and the factor of its loss."""


def grid() -> list[RunRecord]:
    """Six sizes at three lengths, two seeds of the smallest."""
    runs = []
    for depth, seed in [(2, 0), (2, 1), *((depth, 0) for depth in (3, 4, 5, 6, 8))]:
        whole = record(depth, seed, noise=0.002)
        for share, factor in LENGTHS.items():
            changes = {
                name: round(share * getattr(whole, name))
                for name in ("images", "tokens", "flops_exact")
            }
            losses = {name: factor * whole.metric(name) for name in ("loss_avg", "loss_last")}
            name = f"{whole.name}-epochs_{share}"
            runs.append(replace(whole, name=name, **changes, **losses))
    return runs


@pytest.mark.parametrize("form", ["power", "power_floor"])
def test_a_law_of_size_takes_the_best_of_a_grid(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lengths of a size are not its seeds: the command fits the rows that the report fits."""
    write_runs_csv(grid(), tmp_path / "runs.csv")
    law = fit_table(tmp_path / "runs.csv", "params_paper", "loss_avg", form, 0.0)  # type: ignore[arg-type]
    reported = fit_study(grid()).fits["loss_avg", form]
    assert law.rows == reported.rows
    assert law.rows[0] == "d2-s0-epochs_1.0+d2-s1-epochs_1.0" and len(law.rows) == 6
    assert law.params == reported.params and law.intervals == reported.intervals
    assert "d8-s0-epochs_0.5 excluded, other_length" in capsys.readouterr().out


def test_a_variable_that_mixes_sizes_is_refused(tmp_path: Path) -> None:
    write_runs_csv(grid(), tmp_path / "runs.csv")
    with raises("records.sizes-mixed", "d2-s0-epochs_1.0", "d3-s0-epochs_1.0", "same images"):
        fit_table(tmp_path / "runs.csv", "images", "loss_avg", "power", 0.0)


def test_rows_of_equal_x_are_one_point(tmp_path: Path) -> None:
    """Four repeats of five sizes that share what the law misses: intervals that count each row as
    a point would be about half as wide as those of the five means."""
    rng = np.random.default_rng(3)
    sizes = np.geomspace(1e6, 1e8, 5)
    means = 3 * (sizes / 1e6) ** -0.1 * np.exp(0.01 * rng.standard_normal(5))
    rows = [
        f"{x},{mean * np.exp(0.001 * rng.standard_normal())}"
        for x, mean in zip(sizes, means, strict=True)
        for _ in range(4)
    ]
    (tmp_path / "t.csv").write_text("n,loss\n" + "\n".join(rows))
    law = fit_table(tmp_path / "t.csv", "n", "loss", "power", 0.0)
    assert len(law.x) == 5 and law.rows[0] == "line 2+line 3+line 4+line 5"
    low, high = law.intervals["alpha"]
    u = np.log(sizes)
    assert high - low == pytest.approx(
        2 * 3.182 * law.residual_sd / np.sqrt(((u - u.mean()) ** 2).sum()), rel=0.1
    )
    assert law.repeats.counts == (4,) * 5 and 0.0005 < law.repeats.noise < 0.002


def test_what_contradicts_a_law_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes that a law misses by more than their repeats differ; noise between repeats that hides
    whether it grows; points that bend although the row held out lies in their wide interval; and
    an E at its bound, where the points bend downwards. Points of a law have none of these marks
    but the second."""
    x, rng = np.geomspace(1e5, 1e8, 7), np.random.default_rng(4)

    def printed(y: np.ndarray, form: str, repeats: float = 0.0, hold_out: bool = False) -> str:
        rows = ["x,y"]
        for _ in range(3 if repeats else 1):
            wobble = np.exp(repeats * rng.standard_normal(7))
            rows += [f"{a},{b}" for a, b in zip(x, y * wobble, strict=True)]
        (tmp_path / "t.csv").write_text("\n".join(rows))
        options = FitOptions(hold_out="size") if hold_out else FitOptions()
        fit_table(tmp_path / "t.csv", "x", "y", form, 0.0, options=options)  # type: ignore[arg-type]
        return capsys.readouterr().out

    line, floor = 3 * (x / 1e6) ** -0.1, 2 + (x / 1e6) ** -0.4
    scatter = np.exp(0.02 * np.array([1, -1, 1, -1, 1, -1, 1]))
    contradicts, bound = "the points contradict this form", "E is at its bound of 0"
    for form in ("power", "power_floor"):
        assert contradicts in printed(line * scatter, form, repeats=1e-3)
        clean = printed(line * np.exp(1e-3 * scatter), form, repeats=5e-3)
        assert contradicts not in clean and "cannot show whether the noise grows" in clean
    held = printed(floor, "power", hold_out=True)
    assert "% wide): inside" in held and "the other rows contradict this form" in held
    assert "contradict" not in printed(line * (1 + 1e-3 * scatter), "power", hold_out=True)
    steeper = line * np.exp(-0.01 * np.log(x / 1e5) ** 2)
    assert bound in printed(steeper, "power_floor") and bound not in printed(floor, "power_floor")


def test_n_is_what_the_study_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit and report take the parameters that the study counts as N."""
    runs = [replace(run, counted="params_total") for run in grid()]
    write_runs_csv(runs, tmp_path / "runs.csv")
    law = fit_table(tmp_path / "runs.csv", "N", "loss_avg", "power", 0.0)
    named = fit_table(tmp_path / "runs.csv", "params_total", "loss_avg", "power", 0.0)
    result = fit_study(runs)
    reported = result.fits["loss_avg", "power"]
    assert law.params == named.params == reported.params
    assert law.x == reported.x == tuple(sorted({float(run.params_total) for run in runs}))
    assert result.holdouts["loss_avg", "power"].n == max(law.x)
    assert result.to_json()["size"] == "params_total"
    assert "N is params_total" in capsys.readouterr().out
    with raises("records.table-column", "N"):
        fit_table(tmp_path / "runs.csv", "N", "N", "power", 0.0)
    write_runs_csv(grid(), tmp_path / "paper.csv")
    tables = [tmp_path / "runs.csv", tmp_path / "paper.csv"]
    given: dict[str, Any] = {"floor": 0.0, "out": None, "outliers": True, "seed": 0}
    with raises("records.counts-differ", "params_total", "params_paper"):
        fit_tables(tables, "N", "loss_avg", "power", **given)
    fit_tables(tables, "params_total", "loss_avg", "power", **given)
