"""All fits of a study: laws of size, frontiers, laws of data, laws of each scale."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic_study import ladder, law, record
from var_scale.laws.curve import fit_law
from var_scale.records.analyse import StudyResult, fit_study, laws_of_data
from var_scale.records.frontier import FrontierPoint, fit_frontier, pareto


def test_full_fit_uses_all_sizes_and_both_forms(fitted_ladder: StudyResult) -> None:
    """The run that the gate excludes is named in the fit; fit.json has no number that is not
    one."""
    assert len(fitted_ladder.fits) == len(fitted_ladder.holdouts) == 8
    fit = fitted_ladder.fits["loss_last", "power"]
    assert len(fit.rows) == 6
    assert fit.excluded[0][:2] == ("d7-s0", "diverged")
    assert float(fit.predict(1e7)) == pytest.approx(law("loss_last", 1e7), rel=0.01)
    alpha = fitted_ladder.alpha_by_size["loss_avg"]["params_paper"]
    assert alpha == pytest.approx(0.08, abs=0.003)
    json.dumps(fitted_ladder.to_json(), allow_nan=False)


def test_seeds_of_a_size_are_one_point_of_a_fit() -> None:
    """Three seeds that miss the law together do not narrow the interval like independent points."""
    bend = {2: 0.01, 3: -0.01, 4: -0.01, 6: 0.01}
    one = [
        record(d, loss_avg=law("loss_avg", record(d).params_paper) * math.exp(bend[d]))
        for d in bend
    ]
    three = [replace(run, seed=s, name=f"{run.name}{s}") for run in one for s in (0, 1, 2)]
    low, high = (
        fit_study(runs).fits["loss_avg", "power"].intervals["alpha"] for runs in (one, three)
    )
    assert low == pytest.approx(high)


def test_a_law_of_every_scale(fitted_ladder: StudyResult) -> None:
    """The law of a scale is that of its own losses."""
    runs = ladder(noise=0.001)
    assert len(fitted_ladder.by_scale["loss"]) == len(runs[0].loss_per_scale)
    sizes = [run.params_paper for run in runs]
    for scale, fit in enumerate(fitted_ladder.by_scale["loss"]):
        expected = fit_law("power", sizes, [run.loss_per_scale[scale] for run in runs])
        assert fit.converged == expected.converged and fit.params == expected.params


def test_frontier_is_a_running_minimum() -> None:
    """Points behind a better one are not on the frontier; the fit starts where the smallest run
    ended."""
    points = [
        FrontierPoint("a", c, v)
        for c, v in ((1.0, 5.0), (2.0, 6.0), (3.0, 4.0), (3.0, 3.0), (4.0, 3.0))
    ]
    assert [(p.x, p.value) for p in pareto(points)] == [(1, 5), (3, 3)]
    runs = ladder(noise=0)
    front = fit_frontier(runs, "loss_avg")
    assert front.fit.converged
    assert min(front.fit.x) >= min(run.flops_exact for run in runs)
    assert front.alpha_interval is not None
    assert front.alpha_interval[0] < front.fit.params["alpha"] < front.alpha_interval[1]
    assert not fit_frontier([], "loss_avg").fit.converged


def test_laws_of_data() -> None:
    """The frontier along tokens is the best of any size; each size that was trained for three
    lengths has a law."""
    runs = [
        replace(
            record(depth),
            name=f"d{depth}-{k}",
            tokens=k * 10**6,
            flops_exact=k * 10**6 * 6 * record(depth).params_paper,
            loss_avg=law("loss_avg", record(depth).params_paper) * (k / 8) ** -0.05,
            curve=(),
        )
        for depth in (2, 3, 4)
        for k in (1, 2, 4, 8)
    ]
    front = fit_frontier(runs, "loss_avg", along="tokens")
    assert [round(point.x) for point in front.points] == [1e6, 2e6, 4e6, 8e6]
    assert {p.n for p in front.points} == {record(4).params_paper}
    assert front.fit.params["alpha"] == pytest.approx(0.05) and math.isnan(front.size_exponent)
    laws = laws_of_data(runs, "loss_avg", 0.0)
    assert [len(fit.x) for fit in laws] == [4, 4, 4]
    assert all(fit.params["alpha"] == pytest.approx(0.05) for fit in laws)
    assert laws_of_data(ladder(), "loss_avg", 0.0) == ()
    along_compute = fit_frontier(runs, "loss_avg")
    assert 0 < along_compute.size_exponent < 3 and along_compute.size_interval is not None


def test_exponents_by_convention(fitted_ladder: StudyResult) -> None:
    """Counting FLOPs as 6 N D changes the frontier's exponent; counting forward MACs does not."""
    found = fitted_ladder.alpha_by_flops["loss_avg"]
    alpha = fitted_ladder.frontiers["loss_avg"].fit.params["alpha"]
    assert found["flops_exact"] == pytest.approx(alpha)
    assert found["flops_paper"] == pytest.approx(found["flops_exact"])  # a sixth of them everywhere
    assert found["flops_6nd"] != pytest.approx(found["flops_exact"], rel=1e-3)


def test_a_form_that_the_points_reject_leads_nowhere() -> None:
    """Losses with a floor: law, hold-out test and predictions are those of the fitted floor, and
    none lies below it. Where the points are straight, the power law leads."""
    floor, sizes = 3.2, (2, 3, 4, 5, 6, 8, 11, 15)
    rng = np.random.default_rng(2)
    runs = [
        record(d, loss_avg=(floor + 0.6 * (record(d).params_paper / 1e6) ** -0.4) * wobble)
        for d, wobble in zip(sizes, np.exp(1e-3 * rng.standard_normal(8)), strict=True)
    ]
    result = fit_study(runs)
    assert result.adequacy["loss_avg", "power"].rejected
    assert result.leading("loss_avg") == "power_floor" and not result.rejected("loss_avg")
    law, held = result.law("loss_avg"), result.holdout("loss_avg")
    assert law.intervals["E"][0] < floor < law.intervals["E"][1]
    assert held.form == "power_floor" and held.inside and held.gain_fraction < 1
    far = 1e3 * max(law.x)
    assert result.fits["loss_avg", "power"].predict(far) < floor < law.predict(far)
    assert [h.form for h in result.budget_curves["loss_avg"]] == ["power_floor"] * 4
    assert result.to_json()["leading"]["loss_avg"] == "power_floor"
    assert result.leading("loss_last") == "power" and result.law("loss_last").form == "power"
