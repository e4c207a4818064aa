"""The regions of irreducible part E and exponent that points allow together."""

from __future__ import annotations

import numpy as np
import pytest

from var_scale.laws.curve import fit_law
from var_scale.laws.ridge import ridge_regions


@pytest.mark.parametrize("trials", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_the_ridge_of_floor_and_exponent(trials: int) -> None:
    """The 95 % region holds the truth about as often as it states, and its ends agree with the
    profile intervals."""
    x = np.geomspace(1e6, 2e9, 10)
    rng, held = np.random.default_rng(9), 0
    for _ in range(trials):
        y = (4.5 + (x / 5e8) ** -0.23) * np.exp(1e-3 * rng.standard_normal(10))
        fit = fit_law("power_floor", x.tolist(), y.tolist(), noise_floor=0)
        assert fit.converged
        region = ridge_regions(fit, floors=200, alphas=800)
        low, high = (np.interp(4.5, region.floors, ends) for ends in region.most)
        held += bool(low <= 0.23 <= high)
        best = float(region.best[region.excess.argmin()])
        assert region.excess.min() < 0.1 and abs(best / fit.params["alpha"] - 1) < 0.02
        assert np.nanmin(region.most[0]) < np.nanmin(region.half[0]) < fit.params["alpha"]
        assert fit.params["alpha"] < np.nanmax(region.half[1])
        # A region of both together is wider than the interval of one.
        assert np.nanmin(region.most[0]) < fit.intervals["alpha"][0]
    assert held >= (52 if trials == 60 else 6)  # the chance of fewer is below 1 percent
