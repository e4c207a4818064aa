"""Tests of the form of a law, checked by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from var_scale.laws.adequacy import Adequacy, adequacy
from var_scale.laws.curve import fit_law
from var_scale.laws.groups import group
from var_scale.laws.law import LawFit

X = np.geomspace(1e5, 1e8, 8)
NOISE = 4e-3


def means(exact: np.ndarray, repeats: list[int], rng: np.random.Generator) -> LawFit:
    """The power law of sizes with repeats."""
    x, y = np.repeat(X, repeats), np.repeat(exact, repeats)
    points = group(
        [str(k) for k in range(len(x))], x, y * np.exp(NOISE * rng.standard_normal(len(x)))
    )
    return fit_law("power", points.sizes, points.values, noise_floor=0, repeats=points.repeats)


@pytest.mark.parametrize("repeats", [[3] * 8, [4, 4, 4, 2, 2, 1, 1, 1]])
def test_misfit_against_the_noise_between_repeats(repeats: list[int]) -> None:
    """False alarms at 5 %, and a misfit of three times the noise at one size is found."""
    rng, alarms, found = np.random.default_rng(5), 0, 0
    exact = 3 * (X / 1e6) ** -0.1
    odd = exact * np.exp(3 * NOISE * np.eye(8)[3])
    for _ in range(200):
        alarms += adequacy(means(exact, repeats, rng)).p_noise < 0.05
        found += adequacy(means(odd, repeats, rng)).p_noise < 0.05
    assert 3 <= alarms <= 20 and found > 100, (alarms, found)


def test_without_repeats_there_is_no_noise_to_compare_with() -> None:
    law = fit_law("power", X, 3 * (X / 1e6) ** -0.1)
    found = adequacy(law)
    assert np.isnan(found.p_noise) and not found.rejected


def judge(y: np.ndarray) -> Adequacy:
    """The tests of the power law through runs that were not repeated."""
    laws = [fit_law(form, X, y, noise_floor=0) for form in ("power", "power_floor")]
    return adequacy(laws[0], laws[1])


@pytest.mark.parametrize("noise", [2e-3, 8e-3])
def test_the_power_of_the_test_for_a_bend(noise: float) -> None:
    """As often as the test promises it finds a floor of half the smallest loss. Of straight lines,
    about 5 % seem to bend upwards and 2.5 % downwards."""
    rng, found, promised = np.random.default_rng(6), 0, []
    alarms = {1: 0, -1: 0}
    straight = 3 * (X / 1e6) ** -0.05
    floor = straight.min() / 2
    ends = np.log(straight[[0, -1]] - floor)
    bent = floor + np.exp(ends[0] + (ends[1] - ends[0]) * np.log(X / X[0]) / np.log(X[-1] / X[0]))
    for _ in range(300):
        draw = np.exp(noise * rng.standard_normal(8))
        found += judge(bent * draw).p_bend < 0.05
        test = judge(straight * draw)
        alarms[int(np.sign(test.bend))] += test.p_bend < 0.05
        promised.append(test.power)
    assert found / 300 == pytest.approx(np.mean(promised), abs=0.07)
    assert 5 <= alarms[1] <= 27 and 1 <= alarms[-1] <= 18, alarms


def test_bends_of_either_direction() -> None:
    """Upwards the p-value is that of a floor, half of the two-sided one; downwards it is that of
    the coefficient."""
    line = 3 * (X / 1e6) ** -0.1
    noise = np.exp(2e-3 * np.random.default_rng(1).standard_normal(8))
    for sign in (1, -1):
        y = line * noise * np.exp(sign * 1e-3 * np.log(X / X.mean()) ** 2)
        test, law = judge(y), fit_law("power", X, y, noise_floor=0)
        bend, p = law.curvature()
        assert np.sign(bend) == np.sign(test.bend) == sign
        assert test.p_bend == pytest.approx(p / 2 if sign > 0 else p, rel=0.2)
