"""The law that breaks once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_scale.laws import fit
from var_scale.laws.forms import law_value

X = np.geomspace(1e6, 3e9, 14)
TRUTH = {"E": 1.0, "a": 4.0, "alpha_1": 0.03, "alpha_2": 0.12, "x_break": 8e7, "width": 0.4}
EXACT = law_value("broken_power", TRUTH, X)
SLOW = pytest.mark.slow


def test_an_exact_break_is_found() -> None:
    assert EXACT[0] == pytest.approx(
        1 + 4 * (X[0] / 8e7) ** -0.03 * ((1 + (X[0] / 8e7) ** 2.5) / 2) ** (-0.09 * 0.4)
    )
    law = fit(X, EXACT, "broken_power", floor=1.0)
    for name, value in TRUTH.items():
        assert law.params[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("trials", [6, pytest.param(25, marks=SLOW)])
def test_a_law_that_breaks(trials: int) -> None:
    """Intervals hold both exponents, the break and a new run, and AICc prefers this form."""
    rng = np.random.default_rng(4)
    held = dict.fromkeys(("alpha_1", "alpha_2", "x_break", "new"), 0)
    for _ in range(trials):
        y = 1 + (EXACT - 1) * np.exp(3e-3 * rng.standard_normal(14))
        law = fit(X, y, "broken_power", floor=1.0)
        others = fit(X, y, floor=1.0).aicc, fit(X, y, "power_floor").aicc
        assert law.converged and law.aicc < min(others) - 10
        for name in ("alpha_1", "alpha_2", "x_break"):
            held[name] += law.intervals[name][0] <= TRUTH[name] <= law.intervals[name][1]
        at = law.at(6e9)
        noise = math.exp(3e-3 * rng.standard_normal())
        new = 1 + float(law_value("broken_power", TRUTH, 6e9) - 1) * noise
        held["new"] += at.low <= new <= at.high
    assert min(held.values()) >= 0.8 * trials - (trials < 25), held


def test_points_without_a_break_inside_have_no_law_that_breaks() -> None:
    """A straight law has no break that AICc would take; too few sizes or none beyond the break."""
    noise = np.exp(3e-3 * np.random.default_rng(4).standard_normal(14))
    straight = 4 * X**-0.1 * noise
    broken = fit(X, straight, "broken_power")
    assert not broken.converged or broken.aicc > fit(X, straight).aicc
    parts = {"too_few": slice(5), "no_break": slice(8), "": slice(3, 11)}
    for code, part in parts.items():
        few = fit(X[part], EXACT[part], "broken_power", floor=1.0)
        assert few.code == code and few.converged == (not code)
    few = fit(X[4:11], EXACT[4:11], "broken_power", floor=1.0)
    assert math.isnan(few.aicc)  # more parameters than AICc allows


@pytest.mark.parametrize("trials", [10, pytest.param(40, marks=SLOW)])
def test_a_transition_too_wide_for_the_sizes_is_no_break(trials: int) -> None:
    """With the true exponents beyond the points there is no result, and an unbroken law is seldom
    given a break that its AICc would keep."""
    rng = np.random.default_rng(2)
    x = np.geomspace(1e6, 1e9, 20)
    wide = {"E": 0.0, "a": 3.0, "alpha_1": 0.15, "alpha_2": 0.05, "x_break": 3e7, "width": 3.0}
    noises = np.exp(5e-4 * rng.standard_normal((10, 20)))
    made = [fit(x, law_value("broken_power", wide, x) * noise, "broken_power") for noise in noises]
    assert sum(law.converged for law in made) <= 1
    assert "break_too_wide" in {law.code for law in made}
    kept = 0
    for _ in range(trials):
        y = 3 * (x / 1e6) ** -0.1 * np.exp(2e-3 * rng.standard_normal(20))
        kept += fit(x, y, "broken_power").aicc < fit(x, y).aicc - 2
    assert kept <= 0.15 * trials + (trials < 40)
