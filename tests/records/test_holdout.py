"""The hold-out test: the largest size, predicted from the smaller ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.synthetic_study import LAWS, ladder, record
from var_scale.records.analyse import StudyResult
from var_scale.records.holdout import hold_out
from var_scale.records.record import METRICS
from var_scale.records.sizes import seed_noise


def test_hold_out_predicts_the_largest() -> None:
    """The largest run is not among the rows of the fit, and a run far from the law fails."""
    runs = ladder(noise=0.001)
    for metric in METRICS:
        held = hold_out(runs, metric)
        assert held.held == ("d8-s0",)
        assert held.fit is not None
        assert "d8-s0" not in held.fit.rows
        assert abs(held.relative_error) < 0.01
        assert held.inside
        assert [(name, code) for name, code, _ in held.fit.excluded] == [("d8-s0", "held_out")]
        assert held.fit.params["alpha"] == pytest.approx(LAWS[metric][1], abs=0.004)
    far = replace(runs[-1], loss_avg=runs[-1].loss_avg * 1.1)
    assert not hold_out([*runs[:-1], far], "loss_avg").inside


def test_hold_out_keeps_all_seeds_of_the_largest_out() -> None:
    """Seeds of a size are one point, whose value is their mean."""
    runs = [record(d, seed=s, noise=0.002) for d in (2, 3, 4, 6) for s in (0, 1)]
    held = hold_out(runs, "loss_last")
    assert held.held == ("d6-s0", "d6-s1")
    assert held.measured == pytest.approx(math.sqrt(runs[-1].loss_last * runs[-2].loss_last))
    assert held.fit and held.fit.rows == ("d2-s0+d2-s1", "d3-s0+d3-s1", "d4-s0+d4-s1")
    assert 0.0005 < seed_noise(runs, "loss_last") < 0.005
    assert math.isnan(seed_noise(runs[::2], "loss_last"))


def test_predictions_from_ever_more_sizes(fitted_ladder: StudyResult) -> None:
    """The largest size from 3, 4, ... sizes; the last prediction is the hold-out test itself."""
    curve = fitted_ladder.budget_curves["loss_avg"]
    assert [len(held.fit.x) for held in curve if held.fit] == [3, 4, 5]
    assert all(held.held == ("d8-s0",) for held in curve)
    assert curve[-1].prediction == fitted_ladder.holdouts["loss_avg", "power"].prediction


def test_the_largest_size_by_the_surface(fitted_grid: StudyResult) -> None:
    """Runs of several lengths on data that repeat: the surface of the smaller sizes predicts the
    longest run of the largest size, whose value the surface GRID gives exactly."""
    held = fitted_grid.holdout("loss_avg")
    assert held.form == "repeated" and held.fit is not None
    largest = max(fitted_grid.healthy, key=lambda run: (run.params_paper, run.tokens))
    assert held.held == (largest.name,) and held.measured == largest.loss_avg
    assert max(held.fit.x) < largest.params_paper == held.n
    assert abs(held.relative_error) < 1e-3 and held.inside and held.gain_fraction < 0.1
    assert fitted_grid.holdout("loss_last").form == "power"
