"""Compute-optimal sizes: isoFLOP curves, surfaces of size and data, and the best run of a
budget."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic_study import GRID, grid, ladder, record
from var_scale.laws.surface import fit_surface
from var_scale.records.analyse import StudyResult
from var_scale.records.isoflop import curve as parabola
from var_scale.records.isoflop import fit_isoflop
from var_scale.records.optimum import best_surface, fit_surfaces, optimum


def test_isoflop_curves() -> None:
    """Minima where the law has them, the exponent one half from parabolas and surface; a minimum at
    the edge is no result."""
    runs = grid()
    surface = fit_surfaces(runs)["chinchilla"]
    found = fit_isoflop(runs, surface)
    assert found is not None
    assert [round(c.best_n / (c.flops / 6) ** 0.5, 2) for c in found.curves] == [1.0, 1.0, 1.0]
    assert found.exponent == pytest.approx(0.5, abs=0.01)
    assert found.interval[0] <= found.exponent <= found.interval[1]
    assert found.split == pytest.approx(0.5, abs=0.02)
    edge = [run for run in runs if not run.name.startswith("c1e+18") or int(run.name[-1]) < 3]
    again = fit_isoflop(edge, surface)
    assert again is not None
    assert [bool(curve.reason) for curve in again.curves] == [False, True, False]
    assert math.isnan(again.curves[1].best_n)
    assert again.exponent == pytest.approx(0.5, abs=0.01)
    assert fit_isoflop(ladder(), surface) is None


@pytest.mark.parametrize(
    ("law", "exponent", "smallest"),
    [((1.8, 480, 2100, 0.34, 0.37), 0.5211, 2e7), ((1.7, 50, 3000, 0.24, 0.385), 0.616, 3e6)],
)
def test_sizes_far_from_the_minimum_do_not_move_it(
    law: tuple[float, ...], exponent: float, smallest: float
) -> None:
    """Losses without noise over a wide range of sizes: parabolas through all sizes miss the
    exponent beta / (alpha + beta), those about the minimum do not. What entered is named."""
    e, a, b, alpha, beta = law
    runs = [
        record(
            4,
            name=f"{flops:g}-{n:.3g}",
            params_paper=round(n),
            flops_exact=round(flops),
            loss_avg=e + a * n**-alpha + b * (flops / 6 / n) ** -beta,
            curve=(),
        )
        for flops in np.geomspace(1e18, 1e21, 5).tolist()
        for n in np.geomspace(smallest, 1e11, 30).tolist()
    ]
    surface = fit_surface([1.0], [1.0], [1.0])  # not needed: only the parabolas are tested
    found = fit_isoflop(runs, surface)
    assert found is not None and len(found.curves) == 5
    assert found.exponent == pytest.approx(exponent, abs=0.005)
    wide = [np.polyfit(np.log(curve.sizes), curve.losses, 2) for curve in found.curves]
    minima = [-c[1] / (2 * c[0]) for c in wide]
    biased = np.polyfit(np.log([curve.flops for curve in found.curves]), minima, 1)[0]
    assert abs(biased - exponent) > 0.02
    for curve in found.curves:
        sizes = np.array(curve.sizes)
        near = (sizes > 0.249 * curve.best_n) & (sizes < 4.01 * curve.best_n)
        assert curve.entered == tuple(np.array(curve.runs)[near]) and near.sum() >= 5
        u = math.log(curve.best_n) - np.log(sizes).mean()
        assert np.polyval(curve.coefficients[::-1], u) == pytest.approx(curve.best_loss)


def test_at_least_three_sizes_enter_a_parabola() -> None:
    """Sizes a factor of 8 apart; each seed of a size enters."""
    runs = [
        record(4, seed, name=f"{k}-{seed}", params_paper=8**k, flops_exact=10**18, curve=())
        for k in range(6, 11)
        for seed in (0, 1)
    ]
    runs = [replace(run, loss_avg=3 + (math.log(run.params_paper, 8) - 8.2) ** 2) for run in runs]
    found = parabola(runs)
    assert found.best_n == pytest.approx(8**8.2) and found.best_loss == pytest.approx(3)
    assert found.entered == ("7-0", "7-1", "8-0", "8-1", "9-0", "9-1")


def test_the_best_size_for_a_compute_budget() -> None:
    """N = (C / 6)^0.5 within and beyond the study's compute, with intervals that hold the truth."""
    runs = grid()
    rng = np.random.default_rng(3)
    noisy = [
        replace(run, loss_avg=run.loss_avg * float(np.exp(5e-4 * rng.standard_normal())))
        for run in runs
    ]
    for records, close in ((runs, 0.02), (noisy, 0.3)):
        surface = best_surface(fit_surfaces(records))
        assert surface is not None and surface.form == "chinchilla"
        for budget, beyond in ((1e18, False), (1e20, True)):
            best = optimum(surface, records, budget)
            true = (budget / 6) ** 0.5
            loss = GRID["E"] + 2 * GRID["A"] * true ** -GRID["alpha"]
            assert best.n == pytest.approx(true, rel=close)
            assert best.tokens == pytest.approx(budget / 6 / best.n, rel=1e-3)
            assert best.n_interval[0] <= true * 1.01 and best.n_interval[1] >= true * 0.99
            assert best.loss_interval[0] <= loss * 1.0001
            assert best.loss_interval[1] >= loss * 0.9999
            assert 0 < best.halved < 0.1 and 0 < best.doubled < 0.1
            assert best.beyond == beyond and math.isnan(best.epochs)


def test_a_larger_model_is_better_if_the_data_repeat() -> None:
    """The form `repeated` is recognised, and moves the optimum away from repetition."""
    unique = 2 * 10**8
    runs = grid(unique=unique)
    surface = best_surface(fit_surfaces(runs))
    assert surface is not None and surface.form == "repeated"
    assert surface.params["r_star"] == pytest.approx(GRID["r_star"], rel=0.01)
    best = optimum(surface, runs, 1e19)
    assert best.n > 1.2 * (1e19 / 6) ** 0.5
    assert best.epochs == pytest.approx(best.tokens / unique)


def test_a_study_of_one_length_has_no_surface(fitted_ladder: StudyResult) -> None:
    """It has no best size, and the reason."""
    surface = fitted_ladder.surfaces["chinchilla"]
    assert fitted_ladder.optima == ()
    assert not surface.converged and surface.code == "too_few"
