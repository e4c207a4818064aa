"""Which form the points support, and whether their noise is the same at all sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.raises import raises
from var_scale.laws.curve import fit_law
from var_scale.laws.nested import floor_test
from var_scale.laws.noise import noise_trend
from var_scale.laws.surface import fit_surface

SLOW = pytest.mark.slow


def table(rng: np.random.Generator, n: int, floor: float = 0.0, steep: float = 0.0) -> tuple:  # type: ignore[type-arg]
    """Sizes and values with a noise of 0.2 %, which grows as x^steep."""
    x = np.geomspace(1e6, 1e9, n)
    noise = 2e-3 * (x / x[0]) ** steep
    return x, (floor + 3 * (x / 1e6) ** -0.15) * np.exp(noise * rng.standard_normal(n))


def test_aicc_needs_four_points_more_than_parameters() -> None:
    """With six points its penalty for the floor would be 30, which no points overcome."""
    x, y = table(np.random.default_rng(1), 7, floor=1.5)
    for count, power, floor in ((5, False, False), (6, True, False), (7, True, True)):
        fits = [fit_law(form, x[:count], y[:count]) for form in ("power", "power_floor")]
        assert [math.isfinite(fit.aicc) for fit in fits] == [power, floor]
    misses = np.log(y / fits[1].predict(x))
    assert fits[1].aicc == pytest.approx(7 * math.log(float((misses**2).mean())) + 2 * 4 * 7 / 2)


@pytest.mark.parametrize("trials", [8, pytest.param(500, marks=SLOW)])
def test_the_floor_test_rejects_as_often_as_it_states(trials: int) -> None:
    """Of power laws 5 %, of laws with a floor nearly all, from six points. The chance of more
    rejections of power laws than allowed is below 1 %."""
    rng = np.random.default_rng(3)
    rejected = [0, 0]
    for _ in range(trials):
        for k, floor in enumerate((0.0, 1.5)):
            points = table(rng, 6, floor)
            fits = [fit_law(form, *points, noise_floor=0) for form in ("power", "power_floor")]
            rejected[k] += floor_test(*fits) < 0.05
    assert rejected[0] <= (3 if trials == 8 else 41) and rejected[1] >= 0.95 * trials, rejected


def test_the_floor_test_by_independent_arithmetic() -> None:
    """F from both sums of squares; two-sided where E is given, 1 where the best floor is 0."""
    x, y = table(np.random.default_rng(6), 9, floor=0.5)
    power, floor = (fit_law(form, x, y, noise_floor=0) for form in ("power", "power_floor"))
    squares = [float((np.log(y / fit.predict(x)) ** 2).sum()) for fit in (power, floor)]
    t = math.sqrt((squares[0] - squares[1]) / (squares[1] / 6))
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(400000) / np.sqrt(rng.chisquare(6, 400000) / 6)
    assert floor_test(power, floor) == pytest.approx(float((drawn > t).mean()), rel=0.1, abs=2e-5)
    given = fit_law("power", x, y, floor=floor.params["E"], noise_floor=0)
    assert floor_test(given, floor) > 0.5
    flat = 3 * (x / 1e6 + 0.3) ** -0.1
    assert floor_test(*(fit_law(form, x, flat) for form in ("power", "power_floor"))) == 1
    assert math.isnan(
        floor_test(fit_law("power", x[:3], y[:3]), fit_law("power_floor", x[:3], y[:3]))
    )


def test_a_floor_test_of_other_fits_is_refused() -> None:
    x, y = table(np.random.default_rng(6), 9)
    power, floor = fit_law("power", x, y), fit_law("power_floor", x[1:], y[1:])
    for one, two in ((power, floor), (floor, power), (power, power)):
        with raises("laws.nested-forms", one.form, two.form):
            floor_test(one, two)


@pytest.mark.parametrize("form", ["power", pytest.param("power_floor", marks=SLOW)])
def test_noise_that_grows_with_size_is_found(form: str) -> None:
    """By a factor of 10 over 16 points in half of the trials or more; equal noise gives p-values
    that are uniform, and noise that falls is not reported."""
    rng = np.random.default_rng(3)
    trials = 200 if form == "power" else 40
    found = {}
    for steep in (1 / 3, 0.0, -1 / 3):
        points = (table(rng, 16, 1.5 * (form != "power"), steep) for _ in range(trials))
        laws = [fit_law(form, x, y, noise_floor=0) for x, y in points]  # type: ignore[arg-type]
        found[steep] = float(np.mean([noise_trend(law).grows for law in laws]))
    assert found[1 / 3] > 0.5 and found[0.0] < 0.15 and found[-1 / 3] < 0.03, found
    # The range of these sizes is a factor of 1,000, over which this noise grows by 10.
    assert noise_trend(laws[0]).power == pytest.approx(found[1 / 3], abs=0.2)
    exact = fit_law(form, *table(rng, 5))  # type: ignore[arg-type]
    assert noise_trend(exact).undecided and math.isnan(noise_trend(exact).p)


def test_noise_of_a_surface_that_grows_with_size() -> None:
    """By a factor of 10 over 5 sizes, and not at all."""
    rng = np.random.default_rng(4)
    n, d = np.repeat(np.geomspace(5e7, 5e9, 5), 5), np.tile(np.geomspace(1e9, 1e11, 5), 5)
    y = 1.8 + 480 * n**-0.34 + 2100 * d**-0.37
    z = rng.standard_normal(25)
    found = [
        noise_trend(fit_surface(n, d, y * np.exp(5e-3 * (n / 5e9) ** steep * z)))
        for steep in (0.5, 0.0)
    ]
    assert found[0].correlation > 0.2 and found[0].grows and not found[1].grows, found
    assert found[1].power > 0.3


def test_points_that_cannot_show_growing_noise() -> None:
    """Eight points notice a noise that grows by 10 too rarely to answer."""
    x, y = table(np.random.default_rng(5), 8)
    trend = noise_trend(fit_law("power", x, y, noise_floor=0))
    assert not trend.grows and 0.05 < trend.power < 0.6 and trend.undecided
