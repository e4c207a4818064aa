"""Weights, objectives, laws that rise, surfaces with one exponent or without a floor, rows held
out."""

from __future__ import annotations

import csv
import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from tests.laws.conftest import GOLDEN
from tests.raises import raises
from var_scale.laws import fit
from var_scale.laws.forms import law_value
from var_scale.laws.hold_out import hold_out_rows
from var_scale.laws.surface_draws import drawn_errors

TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


def design(sizes: int = 5, lengths: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and tokens of every size trained for every length."""
    n = np.repeat(np.geomspace(5e7, 5e9, sizes), lengths)
    return n, np.tile(np.geomspace(1e9, 1e11, lengths), sizes)


@pytest.mark.parametrize(
    ("data", "errors"), [("rpj", (0.7103, 0.7320)), ("c4", (1.50, 4.30)), ("rw", (1.62,))]
)
def test_the_hold_outs_of_gadre(data: str, errors: tuple[float, ...]) -> None:
    """The published misses in percent of runs with up to 4,000 times the compute, from five small
    runs."""
    with open(GOLDEN / "gadre_c4_val.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["data"] == data]
    columns = [[float(row[key]) for key in ("params", "tokens", "loss")] for row in rows]
    n, d, loss = np.array(columns).T
    used = np.array([row["use"] == "fit" for row in rows])
    law = fit(
        n[used], loss[used], "tied", d=d[used], objective="mse", intervals=False, outliers=False
    )
    assert law.converged and law.freedom == 1 and law.intervals == {}
    missed = 100 * np.abs(law.predict(n[~used], d[~used]) / loss[~used] - 1)
    assert missed == pytest.approx(np.array(errors), abs=0.005)
    if data == "rpj":  # the published coefficients, of 6 N D and D / N
        assert law.params["E"] == pytest.approx(1.8366, abs=1e-4)
        assert law.params["alpha"] == pytest.approx(0.27285, abs=1e-5)


def test_one_exponent_for_size_and_data() -> None:
    """Recovered with noise, with intervals; AICc prefers it to two exponents where one is true."""
    n, d = design()
    truth = {"E": 1.8, "A": 400.0, "B": 900.0, "alpha": 0.3}
    noise = np.exp(2e-3 * np.random.default_rng(1).standard_normal(20))
    y = law_value("tied", truth, n, d)
    assert y[3] == pytest.approx(1.8 + 400 * n[3] ** -0.3 + 900 * d[3] ** -0.3)
    assert fit(n, y, "tied", d=d).params == pytest.approx(truth, rel=1e-4)
    law, free = (fit(n, y * noise, form, d=d) for form in ("tied", "chinchilla"))
    for name, value in truth.items():
        assert law.intervals[name][0] <= value <= law.intervals[name][1], name
    assert law.aicc < free.aicc and "split" not in law.params
    assert law.equation.count("^-0.") == 2


def test_a_surface_without_a_floor_is_a_result() -> None:
    n, d = design()
    y = 480 * n**-0.34 + 2100 * d**-0.37
    noise = np.exp(2e-3 * np.random.default_rng(3).standard_normal(20))
    for noisy in (1.0, noise):
        law = fit(n, y * noisy, "chinchilla", d=d)
        assert law.converged, law.reason
        assert law.params["alpha"] == pytest.approx(0.34, abs=0.02)
        assert law.params["E"] <= 0.02 and law.intervals["E"][0] == 0.0
    exact = fit(n, y, "chinchilla", d=d)
    assert exact.params["E"] == 0 and exact.equation.startswith("y = 480 N^-0.34")


@pytest.mark.parametrize("objective", ["mse", "huber"])
def test_objectives_by_independent_least_squares(objective: Any) -> None:
    """Against scipy's least squares of y from the true parameters, with weights."""
    n, d = design(4, 4)
    rng = np.random.default_rng(6)
    y = law_value("chinchilla", TRUTH, n, d) * np.exp(5e-3 * rng.standard_normal(16))
    w = rng.uniform(0.2, 3, 16)
    law = fit(n, y, "chinchilla", d=d, objective=objective, delta=0.01, weights=w, outliers=False)
    assert law.converged, law.reason

    def misses(theta: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = theta
        fitted = e + np.exp(a - alpha * np.log(n / 5e8)) + np.exp(b - beta * np.log(d / 1e10))
        miss = np.abs(fitted - y)
        square = miss**2 / 2
        if objective == "huber":
            square = np.where(miss < 0.01, square, 0.01 * (miss - 0.005))
        return np.asarray(np.sqrt(2 * w / w.mean() * square))

    a, b = math.log(480 * 5e8**-0.34), math.log(2100 * 1e10**-0.37)
    found = least_squares(misses, [1.8, a, b, 0.34, 0.37], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert law.objective <= found.cost * (1 + 1e-4)
    if objective == "mse":
        assert law.params["alpha"] == pytest.approx(found.x[3], rel=1e-3)
        assert law.params["E"] == pytest.approx(found.x[0], rel=1e-3)


def test_weights_of_a_power_law_by_independent_arithmetic() -> None:
    """Weighted regression in logs; a weight of 2 on every row changes nothing; a row of little
    weight hardly counts."""
    rng = np.random.default_rng(5)
    x, w = np.geomspace(1e6, 1e9, 8), rng.uniform(0.1, 4, 8)
    y = 3 * x**-0.1 * np.exp(0.01 * rng.standard_normal(8) / np.sqrt(w))
    law = fit(x, y, weights=w, noise_floor=0)
    root = np.sqrt(w)
    matrix = root[:, None] * np.stack([np.ones(8), np.log(x)], 1)
    beta, rss, *_ = np.linalg.lstsq(matrix, root * np.log(y), rcond=None)
    covariance = np.linalg.inv(matrix.T @ matrix) * float(rss[0]) / 6
    half = 2.4469 * math.sqrt(covariance[1, 1])
    assert law.params["alpha"] == pytest.approx(-beta[1])
    assert law.intervals["alpha"] == pytest.approx((-beta[1] - half, -beta[1] + half), rel=1e-4)
    at = np.array([1.0, math.log(4e9)])
    new = math.sqrt(at @ covariance @ at + float(rss[0]) / 6 / w.mean())
    high = math.exp(at @ beta + 2.4469 * new)
    assert law.at(4e9).high == pytest.approx(high, rel=1e-4)
    same = fit(x, y, noise_floor=0), fit(x, y, weights=np.full(8, 2.0), noise_floor=0)
    assert same[0].params == pytest.approx(same[1].params)
    assert same[0].intervals["a"] == pytest.approx(same[1].intervals["a"])


def test_weights_of_a_law_with_a_floor() -> None:
    """Whole weights are repeats: the same floor as from a table with the rows repeated, and
    intervals that hold it."""
    rng = np.random.default_rng(8)
    x, w = np.geomspace(1e6, 1e9, 9), np.array([1, 3, 1, 2, 1, 4, 1, 1, 2])
    y = (1.5 + 3 * (x / 1e6) ** -0.25) * np.exp(2e-3 * rng.standard_normal(9) / np.sqrt(w))
    law = fit(x, y, "power_floor", weights=w, noise_floor=0)

    def misses(theta: np.ndarray) -> np.ndarray:
        return np.asarray(np.sqrt(w) * ((theta[0] + theta[1] * (x / 1e6) ** -theta[2]) / y - 1))

    found = least_squares(misses, [1.5, 3, 0.25], xtol=1e-15, ftol=1e-15).x
    assert law.params["E"] == pytest.approx(found[0], rel=1e-5)
    assert law.params["alpha"] == pytest.approx(found[2], rel=1e-5)
    for name, value in (("E", 1.5), ("alpha", 0.25)):
        assert law.intervals[name][0] < law.params[name] < law.intervals[name][1]
        assert law.intervals[name][0] < value < law.intervals[name][1]


def test_a_law_that_rises() -> None:
    """The best size against compute: a positive exponent with its interval, which predictions
    follow; data that fall are refused, and so are data that rise without the option."""
    c = np.geomspace(1e18, 1e22, 6)
    noise = np.exp(0.02 * np.random.default_rng(4).standard_normal(6))
    law = fit(c, 0.1 * c**0.5 * noise, rising=True, variable="C", metric="N")
    assert law.converged and law.params["exponent"] == pytest.approx(0.5, abs=0.01)
    low, high = law.intervals["exponent"]
    assert low < 0.5 < high and "(C/1e20)^0." in law.equation
    at = law.at(1e24)
    assert at.low < 0.1 * 1e24**0.5 < at.high and at.value == pytest.approx(1e11, rel=0.1)
    assert fit(c, 0.1 * c**0.5).code == fit(c, c**-0.5, rising=True).code == "no_decay"


def test_rows_that_are_held_out() -> None:
    """The largest size, and the longest training, predicted by a surface of the others."""
    n, d = design()
    noise = np.exp(1e-3 * np.random.default_rng(2).standard_normal(20))
    y = law_value("chinchilla", TRUTH, n, d) * noise
    y[19] = math.nan
    names = [f"r{k}" for k in range(20)]
    for along, held in (("size", ["r16", "r17", "r18"]), ("length", ["r3", "r7", "r11", "r15"])):
        found = hold_out_rows(along, n, y, "chinchilla", d=d, names=names)  # type: ignore[arg-type]
        assert [row.name for row in found.rows] == held
        assert max((n if along == "size" else d)[~np.isin(names, found.fit.rows)]) == found.at
        assert all(abs(row.relative_error) < 0.02 for row in found.rows)
        assert sum(row.inside for row in found.rows) >= len(held) - 1  # 95 % of them, by design
        for row in found.rows:
            place = names.index(row.name)
            assert row.predicted == pytest.approx(float(found.fit.predict(n[place], d[place])))
    few = hold_out_rows("size", n[:12], y[:12], "chinchilla", d=d[:12])
    assert few.rows == () and few.fit.code == "too_few" and few.to_json()["rows"] == []
    curve = hold_out_rows("size", n[::4], 3 * n[::4] ** -0.1, "power")
    assert [row.name for row in curve.rows] == ["4"] and curve.rows[0].inside
    with raises("laws.option", "power"):
        hold_out_rows("length", n, y, "power")


@pytest.mark.parametrize(("common", "noise"), [(0.0, 3e-3), (6e-3, 2e-3)])
def test_both_errors_of_runs_that_share_a_size(common: float, noise: float) -> None:
    """Of 12 sizes with 6 runs each the residuals of a line show whether a size has an error of its
    own, and how large both are."""
    rng = np.random.default_rng(1)
    size = np.repeat(np.arange(12), 6)
    line = np.stack([np.ones(72), np.tile(np.arange(6.0), 12)], 1)
    own = noise * rng.standard_normal(72)
    y = common * rng.standard_normal(12)[size] + own
    residuals = y - line @ np.linalg.lstsq(line, y, rcond=None)[0]
    noises, ratios = drawn_errors(residuals, line, size, np.ones(72), rng, 2000)
    # One-way analysis of variance; the line takes one more degree of freedom within the sizes.
    means = residuals.reshape(12, 6).mean(1)
    within = math.sqrt(((residuals - means[size]) ** 2).sum() / 59)
    assert np.median(noises) == pytest.approx(within, rel=0.1)
    if common:
        assert np.median(noises * ratios) == pytest.approx(means.std(ddof=1), rel=0.15)
        assert ratios.min() > 0
    else:
        assert (ratios == 0).mean() > 0.5


@pytest.mark.parametrize(
    ("form", "options", "name"),
    [
        ("power", {"weights": [1.0, 2.0]}, "weights"),
        ("power", {"weights": [1.0, -1.0, 2.0]}, "weights"),
        ("broken_power", {"weights": [1.0, 1.0, 1.0]}, "broken_power"),
        ("power", {"objective": "mse"}, "power"),
        ("chinchilla", {"objective": "l1", "d": [1.0, 2.0, 3.0]}, "l1"),
        ("chinchilla", {"delta": -1.0, "d": [1.0, 2.0, 3.0]}, "-1"),
        ("power_floor", {"rising": True}, "power_floor"),
        ("power", {"rising": True, "floor": 1.0}, "1"),
    ],
)
def test_options_that_do_not_fit_are_refused(form: Any, options: Any, name: str) -> None:
    with raises("laws.option", name):
        fit([1.0, 2.0, 3.0], [3.0, 2.0, 1.5], form, **options)
