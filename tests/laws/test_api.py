"""A law for any table: bad rows, outliers, wrong calls."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.raises import raises
from var_scale.errors import UserError
from var_scale.laws import fit
from var_scale.laws.api import to_json
from var_scale.laws.forms import Form, law_value
from var_scale.laws.outliers import find_outliers

X = 2.0 ** np.arange(0, 9, 1.5) * 1e6


@pytest.mark.parametrize(("form", "floor"), [("power", 0.0), ("power_floor", 1.5)])
def test_a_law_is_recovered_from_a_table_with_bad_rows(form: Form, floor: float) -> None:
    """Noise, runs that diverged (nan, inf, a loss that exploded) and a run that is off by a third:
    named, and the law is found."""
    rng = np.random.default_rng(11)
    x = 2.0 ** np.arange(12) * 1e6
    y = (floor + 3 * (x / 1e6) ** -0.2) * np.exp(2e-3 * rng.standard_normal(12))
    y[2], y[5], y[7], y[9] = math.nan, math.inf, 1.3 * y[7], 11.0
    law = fit(x, y, form, names=[f"r{k}" for k in range(12)])
    assert law.converged
    assert law.params["alpha"] == pytest.approx(0.2, abs=0.02 if floor else 0.002)
    assert [(row, code) for row, code, _ in law.excluded] == [
        ("r2", "non_finite"),
        ("r5", "non_finite"),
        ("r7", "outlier"),
        ("r9", "outlier"),
    ]
    assert law.rows == tuple(f"r{k}" for k in (0, 1, 3, 4, 6, 8, 10, 11))
    assert len(fit(x, y, form, outliers=False).x) == 10
    value = to_json(law)
    json.dumps(value, allow_nan=False)
    keys = {"form", "params", "intervals", "objective", "status", "code", "n_rows", "excluded"}
    assert keys <= value.keys() and value["n_rows"] == 8


def test_a_surface_is_recovered_from_a_table_with_bad_rows() -> None:
    rng = np.random.default_rng(11)
    n, d = (10 ** rng.uniform(low, low + 3, 40) for low in (6, 8))
    loss = (1.7 + 400 * n**-0.34 + 2000 * d**-0.37) * np.exp(3e-3 * rng.standard_normal(40))
    loss[3], loss[9] = math.nan, 12.0
    law = fit(n, loss, "chinchilla", d=d)
    assert law.converged and [(row, code) for row, code, _ in law.excluded] == [
        ("3", "non_finite"),
        ("9", "outlier"),
    ]
    assert law.params["alpha"] == pytest.approx(0.34, abs=0.03)
    assert law.params["E"] == pytest.approx(1.7, abs=0.05)


def test_no_outlier_is_made_by_a_bend_or_by_noise() -> None:
    """A law with a floor fitted without it loses no point; of 300 clean tables at most a few lose
    one."""
    assert fit(X, 1.5 + 3 * (X / 1e6) ** -0.25).excluded == ()
    noises = np.exp(5e-3 * np.random.default_rng(2).standard_normal((300, len(X))))
    assert sum(bool(fit(X, 3 * (X / 1e6) ** -0.1 * noise).excluded) for noise in noises) <= 3
    rng = np.random.default_rng(14)
    n = 73728.0 * np.array([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30]) ** 3
    lost, all_rows = 0, np.ones(12, dtype=bool)
    for _ in range(60):
        y = (4.5 + (2 * n / 1e9) ** -0.23) * np.exp(2e-3 * rng.standard_normal(12))
        lost += bool(find_outliers("power_floor", [n], y, all_rows))
    assert lost <= 2


@pytest.mark.parametrize("form", ["power", "power_floor", "broken_power"])
@pytest.mark.parametrize("points", [30, 100])
def test_a_bend_is_no_outlier_where_points_are_evenly_spaced(form: Form, points: int) -> None:
    """Most points lie where the curve is flat, so a robust line follows these; an upper end that
    steepens is no outlier either, and a run that is off is one for every form."""
    x = np.arange(1.0, points + 1)
    noise = np.exp(1e-4 * np.random.default_rng(3).standard_normal(points))
    for y in (5 + 2 * x**-0.5, (5 + 2 * x**-0.5) * noise, 7 - 2 * (x / points) ** 8):
        assert fit(x, y, form).excluded == ()
    y = (5 + 2 * x**-0.5) * noise
    y[20] *= 1.05
    assert [row for row, *_ in fit(x, y, form).excluded] == ["20"]


def test_all_forms_of_one_variable_get_the_same_rows() -> None:
    """Of tables with and without outliers, so that AICc compares the same points."""
    rng = np.random.default_rng(8)
    x = np.geomspace(1e6, 1e9, 14)
    for _ in range(6):
        y = (rng.choice([0.0, 1.5]) + 3 * (x / 1e6) ** -0.2) * np.exp(
            3e-3 * rng.standard_normal(14)
        )
        y[rng.integers(14)] *= rng.choice([1.0, 0.8, 1.4])
        rows = {fit(x, y, form).rows for form in ("power", "power_floor", "broken_power")}
        assert len(rows) == 1


def test_outliers_of_a_surface(chinchilla: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Diverged runs among twenty are left out and the intervals stay narrow; the table of the
    Chinchilla runs keeps its rows."""
    rng = np.random.default_rng(14)
    truth = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
    n, d = np.repeat(np.geomspace(5e7, 5e9, 5), 4), np.tile(np.geomspace(1e9, 1e11, 4), 5)
    y = law_value("chinchilla", truth, n, d) * np.exp(3e-3 * rng.standard_normal(20))
    y[4], y[11] = 1.5 * y[4], 3 * y[11]
    law = fit(n, y, "chinchilla", d=d)
    assert [(row, code) for row, code, _ in law.excluded] == [("4", "outlier"), ("11", "outlier")]
    assert law.converged and law.intervals["A"][1] < 1e4
    assert law.params["split"] == pytest.approx(0.52, abs=0.1)
    n, d, loss = chinchilla
    assert find_outliers("chinchilla", [n, d], loss, np.ones(240, dtype=bool)) == []


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (([[1.0, 2.0]], [1.0]), "laws.not-numbers", "y"),
        ((["a", "b"], [1.0, 2.0]), "laws.not-numbers", "y"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), "laws.lengths-differ", "y"),
        (([1.0, -2.0], [1.0, 2.0]), "laws.not-positive", "x"),
        (([1.0, 2.0], [1.0, 2.0], "cubic"), "laws.form-unknown", "cubic"),
        (([1.0, 2.0], [1.0, 2.0], "chinchilla"), "laws.variables", "x, d"),
        (([1.0, 2.0], [1.0, 2.0], "repeated"), "laws.variables", "x, d, unique"),
    ],
)
def test_wrong_calls(arguments: tuple[Any, ...], code: str, name: str) -> None:
    with raises(code, name):
        fit(*arguments)


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(UserError, match="-5") as error:
        fit([1.0, 2.0], [1.0, 2.0], floor=-5.0)
    assert error.value.code == "laws.floor-negative"
