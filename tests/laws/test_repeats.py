"""The noise about a law from residuals and repeats, against sampling and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from var_scale.laws.curve import fit_law
from var_scale.laws.groups import group
from var_scale.laws.repeats import NONE, RATIOS, Repeats, Spread, noise_of

X = np.geomspace(1e5, 1e7, 5)
COUNTS = (3, 3, 3, 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_against_draws_from_the_posterior(seed: int) -> None:
    """Both noises have the precision, in mean and variance, of weighted draws of r and s."""
    rng = np.random.default_rng(seed)
    residual, between, freedom = rng.uniform(0.5, 3), rng.uniform(0.5, 1), int(rng.integers(1, 6))
    repeats = Repeats(COUNTS, between, 6)
    found = noise_of(residual, freedom, repeats, 0.0)

    count = 400_000
    r = RATIOS[0] * (RATIOS[-1] / RATIOS[0]) ** rng.random(count)
    s2 = 6 * between**2 / rng.chisquare(6, count)  # what the repeats alone allow
    mean = 3 / 5 + r**2  # the average of 1/n
    weights = (s2 * mean) ** (-freedom / 2) * np.exp(-freedom * residual**2 / (2 * s2 * mean))
    for spread, share in ((found.point, mean), (found.run, 1 + r**2)):
        precision = 1 / (s2 * share)
        level = float(np.average(precision, weights=weights))
        variance = float(np.average((precision - level) ** 2, weights=weights))
        assert spread.sd == pytest.approx(level**-0.5, rel=0.02)
        assert spread.freedom == pytest.approx(2 * level**2 / variance, rel=0.05)


def test_what_repeats_cannot_tell() -> None:
    """Without repeats, with repeats that are equal, and far beyond their noise, the scatter alone
    counts; the smallest noise is kept to."""
    alone = Spread(0.02, 3)
    for repeats in (NONE, Repeats(COUNTS, 0.0, 6), Repeats(COUNTS, 1e-17, 6), Repeats((1,) * 5)):
        assert noise_of(0.02, 3, repeats, 0.0) == (alone, alone)
        assert noise_of(0.02, 3, repeats, 0.05).run == Spread(0.05, 3)
    assert noise_of(0.001, 3, Repeats(COUNTS, 0.002, 6), 0.05).run.sd == 0.05


def test_repeats_that_explain_the_scatter_give_their_freedom() -> None:
    """With many repeats and residuals as large as their noise, there is little doubt left."""
    many = noise_of(0.01 / math.sqrt(10), 3, Repeats((10,) * 5, 0.01, 45), 0.0)
    assert 0.0099 < many.run.sd < 0.0115 and many.run.freedom > 20
    assert many.point.sd < 0.5 * many.run.sd
    misfit = noise_of(0.05, 3, Repeats((10,) * 5, 0.01, 45), 0.0)
    assert 0.03 < misfit.run.sd < 0.06 and misfit.run.freedom < 8


@pytest.mark.parametrize("form", ["power", "power_floor"])
def test_intervals_with_repeats_hold_the_truth_and_are_narrower(form: str) -> None:
    """In ladders with three seeds of the smaller sizes, with and without an error of each size."""
    rng, noise, ahead = np.random.default_rng(8), 5e-3, 3e7
    n = np.repeat(X, COUNTS)
    floor = 2.0 if form == "power_floor" else 0.0
    names, trials = [str(run) for run in range(len(n))], 300 if form == "power" else 16
    for common in (0.0, 1.0):
        held = exponent = 0
        widths = []
        for _ in range(trials):
            errors = common * rng.standard_normal(6)
            logs = np.repeat(errors[:5], COUNTS) + rng.standard_normal(len(n))
            law = floor + (n / 1e6) ** -0.2
            points = group(names, n, law * np.exp(noise * logs))
            after = (floor + (ahead / 1e6) ** -0.2) * math.exp(
                noise * (errors[5] + rng.standard_normal())
            )
            fits = [
                fit_law(form, points.sizes, points.values, noise_floor=least, repeats=repeats)  # type: ignore[arg-type]
                for least, repeats in ((0.0, points.repeats), (points.noise, NONE))
            ]
            if not all(fit.converged for fit in fits):
                continue
            at, before = (fit.at(ahead) for fit in fits)
            held += at.low <= after <= at.high
            low, high = fits[0].intervals["alpha"]
            exponent += low <= 0.2 <= high
            widths.append((at.high - at.low) / (before.high - before.low))
        assert len(widths) > 0.9 * trials
        least = 0.9 if form == "power" else 0.75  # of 16
        assert held / len(widths) >= least and exponent / len(widths) >= least
        assert np.median(widths) < 0.85
