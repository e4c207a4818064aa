"""Fits against published data and against laws that are known."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from var_scale.errors import UserError
from var_scale.study import fit
from var_scale.study.api import to_json
from var_scale.study.compare import compare
from var_scale.study.laws import LawFit, effective_data, law_value
from var_scale.study.next_runs import Candidate, advise
from var_scale.study.power import fit_law, floor_strip
from var_scale.study.surface import fit_surface, huber_objective

GOLDEN = Path(__file__).parents[1] / "golden" / "laws"
X = 2.0 ** np.arange(0, 9, 1.5) * 1e6


def chinchilla_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with open(GOLDEN / "chinchilla_epoch.csv") as file:
        table = np.array([[float(row[key]) for key in ("Model Size", "Training FLOP", "loss")] for row in csv.DictReader(file)])
    table = table[table[:, 2] < np.sort(table[:, 2])[-5]]
    return table[:, 0], table[:, 1] / (6 * table[:, 0]), table[:, 2]


def test_chinchilla_reaches_the_optimum() -> None:
    n, d, loss = chinchilla_data()
    assert len(n) == 240
    fit = fit_surface(n, d, loss, draws=100)
    assert fit.converged
    assert fit.objective <= 1.01828e-3
    published = {"A": (482.01, 124.5), "B": (2085.43, 1293), "E": (1.8172, 0.0257), "alpha": (0.3478, 0.0154), "beta": (0.3658, 0.0206)}
    for name, (value, error) in published.items():
        assert abs(fit.params[name] - value) < error, name
    low, high = fit.intervals["split"]
    assert low == pytest.approx(0.477, abs=0.025)
    assert high == pytest.approx(0.557, abs=0.025)
    assert fit.audit["agree"] == fit.audit["descents"] >= 4 and fit.audit["starts"] >= 4500
    assert np.log(loss / fit.predict(n, d)) == pytest.approx(np.array(fit.residuals))


def test_published_parameters_are_worse() -> None:
    n, d, loss = chinchilla_data()
    theta = np.array([math.log(482.01), math.log(2085.43), math.log(1.8172), 0.3478, 0.3658])
    value, gradient = huber_objective(theta, np.log(n), np.log(d), np.log(loss))
    assert value * 1e-6 == pytest.approx(1.022843e-3, rel=1e-3)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-7
        ahead, behind = (huber_objective(theta + s * step, np.log(n), np.log(d), np.log(loss))[0] for s in (1, -1))
        assert gradient[i] == pytest.approx((ahead - behind) / 2e-7, rel=1e-3)


def test_routing_is_a_pure_power_law() -> None:
    with open(GOLDEN / "deepmind_routing_dense.csv") as file:
        table = [(float(row["parameters"]), float(row["loss_validation"])) for row in csv.DictReader(file)]
    fit = fit_law("power", *zip(*table, strict=True))
    assert math.log(fit.params["a"]) == pytest.approx(2.4544, abs=5e-5)
    assert fit.params["alpha"] == pytest.approx(0.07876, abs=5e-6)
    assert fit.r == pytest.approx(-0.99913, abs=5e-6)
    low, high = fit.intervals["alpha"]
    assert low < 0.078 < high


def test_paper_form_gives_beta_in_billions() -> None:
    n = np.array([16e6, 100e6, 500e6, 2e9])
    fit = fit_law("power", n, 4.5 + (2.0 * n / 1e9) ** -0.23, floor=4.5, metric="loss_last")
    assert fit.params["alpha"] == pytest.approx(0.23)
    assert fit.params["beta"] == pytest.approx(2.0)
    assert "4.5000 + 1.235 (N/2e8)^-0.2300" in fit.equation
    assert fit.r == pytest.approx(-1)


def test_noise_floor_counts_above_the_assumed_floor() -> None:
    """Noise of 0.1 % in L is ten times as much in L - E where E is nine tenths of L: the interval says so."""
    x = np.array([1e3, 1e4, 1e5, 1e6])
    plain, above = (fit_law("power", x, e + (x / 1e3) ** -0.01, floor=e, noise_floor=1e-3) for e in (0.0, 9.0))
    widths = [high - low for low, high in (law.intervals["alpha"] for law in (plain, above))]
    assert widths[1] / widths[0] == pytest.approx(10, rel=0.05)
    at = [law.at(1e5) for law in (plain, above)]
    relative = [(here.high - here.low) / here.value for here in at]
    assert relative[1] == pytest.approx(relative[0], rel=0.02)  # of L itself the noise is the same


def test_floor_is_recovered() -> None:
    fit = fit_law("power_floor", X, 1.5 + 3 * (X / 1e6) ** -0.25, noise_floor=0)
    assert fit.converged, fit.reason
    assert fit.params["E"] == pytest.approx(1.5, abs=1e-4)
    assert fit.params["alpha"] == pytest.approx(0.25, abs=1e-4)
    noisy = fit_law("power_floor", X, (1.5 + 3 * (X / 1e6) ** -0.25) * np.exp(2e-3 * np.random.default_rng(1).standard_normal(len(X))))
    assert noisy.intervals["E"][0] < 1.5 < noisy.intervals["E"][1]
    assert noisy.intervals["alpha"][0] < 0.25 < noisy.intervals["alpha"][1]


def test_floor_at_zero_is_reported() -> None:
    fit = fit_law("power_floor", X, 3 * (X / 1e6 + 0.3) ** -0.1)
    assert fit.converged, fit.reason
    assert fit.params["E"] == 0
    assert fit.audit["active_bounds"] == ["floor at 0"]


def test_an_exact_power_law_has_no_floor() -> None:
    """Nothing left over at E = 0, where the objective has a kink: converged all the same."""
    x = np.array([1e3, 1e4, 1e5, 1e6])
    fit = fit_law("power_floor", x, 5 * x**-0.1)
    assert fit.converged, fit.reason
    assert fit.params["alpha"] == pytest.approx(0.1, rel=1e-4)
    assert fit.params["E"] < 1e-3
    assert fit_law("power", x, 5 * x**-0.1).local_exponents() == pytest.approx([0.1] * 3)


def test_floor_that_is_not_identified_is_no_result() -> None:
    fit = fit_law("power_floor", X, [3.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert fit.status == "not-converged"
    assert "not identified" in fit.reason
    with pytest.raises(UserError, match="did not converge"):
        fit.predict(1e9)


def test_an_exponent_that_the_points_do_not_bound_has_an_open_interval() -> None:
    """Five points of a nearly flat law: with the floor free any steep decay fits too. JSON has no infinity."""
    n = np.array([2.6e3, 2.1e4, 7e4, 1.66e5, 3.24e5])
    five = fit_law("power_floor", n, [5.2620, 5.1682, 5.0050, 4.9272, 4.8905])
    assert five.converged and five.intervals["alpha"][1] > 1 and five.intervals["E"][1] > 4.8
    fit = fit_law("power_floor", n[:4], [5.2620, 5.1682, 5.0050, 4.9272])
    assert fit.converged and fit.intervals["alpha"][1] == fit.intervals["a"][1] == math.inf
    assert fit.intervals["alpha"][0] == 0.0
    assert fit.to_json()["intervals"]["alpha"][1] is None


def test_a_bend_is_seen_and_a_straight_line_is_not_called_bent() -> None:
    """p-values of the quadratic term: tiny for a law with a floor fitted without it, uniform for a true power law."""
    assert fit_law("power", X, 1.5 + 3 * (X / 1e6) ** -0.25).curvature()[1] < 1e-3
    rng = np.random.default_rng(5)
    p = [fit_law("power", X, 3 * (X / 1e6) ** -0.1 * np.exp(5e-3 * rng.standard_normal(len(X)))).curvature()[1] for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    assert math.isnan(fit_law("power", X[:3], 3 * X[:3] ** -0.1).curvature()[1])


def test_exponent_depends_on_the_assumed_floor_but_r_hardly() -> None:
    """The paper's ladder, spec/scaling.md 0.3: true E = 4.5."""
    n = 73728.0 * np.array([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 30]) ** 3
    y = 4.5 + (2.0 * n / 1e9) ** -0.23
    expected = {3.5: (0.127, -0.9974), 4.0: (0.163, -0.9989), 4.4: (0.212, -0.9999), 4.5: (0.230, -1.0), 5.0: (0.413, -0.9916)}
    for row, (alpha, r) in zip(floor_strip(n, y, [floor / y.min() for floor in expected]), expected.values(), strict=True):
        assert row["alpha"] == pytest.approx(alpha, abs=0.003)
        assert row["r"] == pytest.approx(r, abs=5e-4)


def coverage(form: str, floor: float, trials: int) -> tuple[float, int]:
    rng = np.random.default_rng(7)
    hits = fits = 0
    for _ in range(trials):
        y = (floor + 3 * (X / 1e6) ** -0.15) * np.exp(4e-3 * rng.standard_normal(len(X)))
        fit = fit_law(form, X[:-1], y[:-1])  # type: ignore[arg-type]
        if fit.converged:
            at = fit.at(X[-1])
            fits += 1
            hits += at.low <= y[-1] <= at.high
    return hits / fits, fits


def test_prediction_interval_of_the_power_law_covers() -> None:
    share, fits = coverage("power", 0.0, 1500)
    assert fits == 1500
    assert 0.935 <= share <= 0.968


def test_prediction_interval_with_a_floor_covers() -> None:
    share, fits = coverage("power_floor", 1.0, 150)
    assert fits > 120
    assert 0.89 <= share <= 1.0


@pytest.mark.parametrize(
    ("form", "x", "y", "match"),
    [
        ("power", [1e6, 2e6], [3.0, 2.0], "2 sizes for 2 parameters"),
        ("power_floor", [1e6, 2e6, 4e6], [3.0, 2.0, 1.8], "3 sizes for 3 parameters"),
        ("power", [1e6, 1e6, 1e6, 2e6], [3.0, 2.9, 3.1, 2.0], "2 sizes"),
        ("power", [1e6, 2e6, 4e6], [3.0, math.nan, 2.0], "not a positive finite"),
        ("power", [1e6, 2e6, 4e6], [2.0, 2.1, 2.3], "does not fall"),
        ("power", [], [], "0 sizes"),
    ],
)
def test_unfit_points_are_named(form: str, x: list[float], y: list[float], match: str) -> None:
    fit = fit_law(form, x, y)  # type: ignore[arg-type]
    assert fit.status == "not-converged"
    assert match in fit.reason
    assert "not converged" in fit.equation


def test_floor_above_the_data_and_wrong_calls() -> None:
    assert "not below the smallest" in fit_law("power", X, 3 * X**-0.1, floor=3.0).reason
    with pytest.raises(UserError, match="law form"):
        fit_law("cubic", [1], [1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="as many"):
        fit_law("power", [1.0], [1.0, 2.0])
    assert "at least 6 runs" in fit_surface([1e6] * 3, [1e6] * 3, [1.0] * 3).reason


def test_json_has_no_nan_and_seed_repeats() -> None:
    y = (1 + 3 * (X / 1e6) ** -0.2) * np.exp(1e-3 * np.random.default_rng(3).standard_normal(len(X)))
    one, two = (fit_law("power_floor", X, y, seed=5) for _ in range(2))
    assert one.intervals == two.intervals
    json.dumps(one.to_json(), allow_nan=False)
    json.dumps(fit_law("power", [1.0], [1.0]).to_json(), allow_nan=False)


def test_the_api_recovers_laws_from_tables_with_bad_rows() -> None:
    """Noise, runs that diverged (nan, inf, a loss that exploded) and a run that went wrong by a third: named, and the law is found."""
    rng = np.random.default_rng(11)
    x = 2.0 ** np.arange(12) * 1e6
    for form, floor in (("power", 0.0), ("power_floor", 1.5)):
        y = (floor + 3 * (x / 1e6) ** -0.2) * np.exp(2e-3 * rng.standard_normal(12))
        y[2], y[5], y[7], y[9] = math.nan, math.inf, 1.3 * y[7], 11.0
        law = fit(x, y, form, names=[f"r{k}" for k in range(12)])  # type: ignore[arg-type]
        assert law.converged and law.params["alpha"] == pytest.approx(0.2, abs=0.02 if floor else 0.002)
        assert [(row, code) for row, code, _ in law.excluded] == [
            ("r2", "non_finite"), ("r5", "non_finite"), ("r7", "outlier"), ("r9", "outlier")]  # fmt: skip
        assert law.rows == tuple(f"r{k}" for k in (0, 1, 3, 4, 6, 8, 10, 11))
    assert len(fit(x, y, "power_floor", outliers=False).x) == 10
    value = to_json(law)
    json.dumps(value, allow_nan=False)
    assert {"form", "params", "intervals", "objective", "status", "n_rows", "excluded"} <= value.keys() and value["n_rows"] == 8
    n, d = (10 ** rng.uniform(low, low + 3, 40) for low in (6, 8))
    loss = (1.7 + 400 * n**-0.34 + 2000 * d**-0.37) * np.exp(3e-3 * rng.standard_normal(40))
    loss[3], loss[9] = math.nan, 12.0
    law = fit(n, loss, "chinchilla", d=d)
    assert law.converged and law.params["alpha"] == pytest.approx(0.34, abs=0.03) and law.params["E"] == pytest.approx(1.7, abs=0.05)
    with pytest.raises(UserError, match="is of x, d"):
        fit(n, loss, "chinchilla")
    with pytest.raises(UserError, match="positive finite"):
        fit([1.0, -2.0], [1.0, 2.0])


def test_no_outlier_is_made_by_a_bend_or_by_noise() -> None:
    """A law with a floor fitted without it loses no point; of 300 clean tables at most a few lose one."""
    assert fit(X, 1.5 + 3 * (X / 1e6) ** -0.25).excluded == ()
    rng, lost = np.random.default_rng(2), 0
    for _ in range(300):
        lost += bool(fit(X, 3 * (X / 1e6) ** -0.1 * np.exp(5e-3 * rng.standard_normal(len(X)))).excluded)
    assert lost <= 3


def test_profile_intervals_cover() -> None:
    """Of E and alpha on the paper's ladder: 95 % of 95 % intervals hold the truth (docs/laws.md has more trials)."""
    n = 73728.0 * np.array([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30]) ** 3
    rng, held = np.random.default_rng(0), {"E": 0, "alpha": 0}
    for _ in range(200):
        y = (4.5 + (2.0 * n / 1e9) ** -0.23) * np.exp(2e-3 * rng.standard_normal(len(n)))
        law = fit_law("power_floor", n, y, noise_floor=0)
        for name, truth in (("E", 4.5), ("alpha", 0.23)):
            held[name] += law.intervals[name][0] <= truth <= law.intervals[name][1]
    assert all(182 <= count <= 199 for count in held.values()), held


def test_comparing_two_laws() -> None:
    """Equal laws: p uniform, the interval of the ratio holds 1 in 95 %; a shift of 2 % and another exponent are found."""
    rng = np.random.default_rng(4)

    def one(shift: float = 0.0, alpha: float = 0.1) -> LawFit:
        noise = 2e-3 * rng.standard_normal(len(X))
        return fit_law("power", X.tolist(), (3 * (X / 1e6) ** -alpha * np.exp(shift + noise)).tolist(), noise_floor=0)

    same = [compare(one(), one()) for _ in range(400)]
    assert 0.02 < np.mean([found.p_same < 0.05 for found in same]) < 0.09
    assert 0.92 < np.mean([found.low <= 1 <= found.high for found in same]) < 0.98
    shifted, bent = compare(one(), one(0.02)), compare(one(), one(alpha=0.11))
    assert shifted.p_same < 1e-3 < shifted.p_exponent and shifted.ratio == pytest.approx(1.02, abs=0.004) and "+2." in shifted.sentence()
    assert bent.p_exponent < 1e-3
    law = one()
    itself = compare(law, law)
    assert itself.p_same == pytest.approx(1) and itself.p_exponent == pytest.approx(1)
    with pytest.raises(UserError, match="form power"):
        compare(one(), fit_law("power", [1.0], [1.0]))


def test_the_expected_interval_is_what_comes_of_it() -> None:
    """The width that the information predicts is the spread of exponents over simulated studies; advice keeps the budget, is no worse than
    any single run, and asks for range where E is fitted."""
    rng, x = np.random.default_rng(9), 2.0 ** np.arange(0, 10) * 1e6

    def study(sizes: np.ndarray, form: str) -> LawFit:
        floor = 1.5 if form == "power_floor" else 0.0
        noise = np.exp(2e-3 * rng.standard_normal(len(sizes)))
        losses = (floor + 3 * (sizes / 1e6) ** -0.2) * noise
        return fit_law(form, sizes.tolist(), losses.tolist(), noise_floor=2e-3)  # type: ignore[arg-type]

    for form in ("power", "power_floor"):
        law = study(x, form)
        candidates = [Candidate(f"s{k}", float(size), 2.0**k) for k, size in enumerate(2.0 ** np.arange(0, 12) * 1e6)]
        advice = advise(law, candidates, 1500)
        assert advice.cost <= 1500 and advice.half_after < 0.8 * advice.half_before
        singles = [advise(law, [c], 1500, at_most=1).half_after for c in candidates if c.cost <= 1500]
        assert advice.half_after <= min(singles)
        more = np.concatenate([x, *(np.full(count, c.x) for c, count in advice.runs)])
        spread = np.std([study(more, form).params["alpha"] for _ in range(60)])
        t = 1.96 + 2.5 / len(more)
        assert advice.half_after == pytest.approx(t * spread, rel=0.35)
        if form == "power_floor":
            assert max(c.x for c, _ in advice.runs) >= x[-1]
    assert advise(law, candidates, 0.5).runs == () and "nothing that fits" in advise(law, candidates, 0.5).lines()[0]
    with pytest.raises(UserError, match="cost above 0"):
        advise(law, [Candidate("a", 1.0, 0.0)], 1)
    with pytest.raises(UserError, match="one variable is needed"):
        advise(fit_law("power", [1.0], [1.0]), candidates, 1)


def test_a_law_that_breaks() -> None:
    """Both exponents and the break are found, AICc prefers it to the other forms, and a straight law has no break that AICc would take."""
    rng = np.random.default_rng(4)
    x = np.geomspace(1e6, 3e9, 14)
    truth = {"E": 1.0, "a": 4.0, "alpha_1": 0.03, "alpha_2": 0.12, "x_break": 8e7, "width": 0.4}
    exact = law_value("broken_power", truth, x)
    assert exact[0] == pytest.approx(1 + 4 * (x[0] / 8e7) ** -0.03 * ((1 + (x[0] / 8e7) ** 2.5) / 2) ** (-0.09 * 0.4))
    law = fit(x, exact, "broken_power", floor=1.0)
    for name, value in truth.items():
        assert law.params[name] == pytest.approx(value, rel=1e-4), name
    held = dict.fromkeys(("alpha_1", "alpha_2", "x_break", "new"), 0)
    for _ in range(25):
        y = 1 + (exact - 1) * np.exp(3e-3 * rng.standard_normal(14))
        law = fit(x, y, "broken_power", floor=1.0)
        assert law.converged and law.aicc < min(fit(x, y, form, floor=1.0 if form == "power" else 0.0).aicc  # type: ignore[arg-type]
                                                for form in ("power", "power_floor")) - 10  # fmt: skip
        for name in ("alpha_1", "alpha_2", "x_break"):
            held[name] += law.intervals[name][0] <= truth[name] <= law.intervals[name][1]
        at = law.at(6e9)
        new = 1 + float(law_value("broken_power", truth, 6e9) - 1) * math.exp(3e-3 * rng.standard_normal())
        held["new"] += at.low <= new <= at.high
    assert min(held.values()) >= 20, held
    straight = 4 * x**-0.1 * np.exp(3e-3 * rng.standard_normal(14))
    broken = fit(x, straight, "broken_power")
    assert not broken.converged or broken.aicc > fit(x, straight).aicc
    for part, words in ((slice(5), "at least 6"), (slice(8), "no break inside"), (slice(3, 11), "")):
        few = fit(x[part], exact[part], "broken_power", floor=1.0)
        assert few.converged == (not words) and words in few.reason
    assert math.isnan(fit(x[4:11], exact[4:11], "broken_power", floor=1.0).aicc)  # more parameters than AICc can bear


def test_a_law_of_repeated_data() -> None:
    """r_star is found; where repetition costs nothing, or no data are repeated, the fit says so; AICc tells it from chinchilla."""
    rng = np.random.default_rng(7)
    unique = 8.7e8
    n, d = np.repeat(np.geomspace(2e7, 2e9, 5), 6), np.tile(unique * np.array([0.25, 1, 4, 16, 60, 200]), 5)
    truth = {"E": 4.0, "A": 40.0, "B": 300.0, "alpha": 0.28, "beta": 0.30, "r_star": 12.0}
    assert float(effective_data(0.5 * unique, unique, 12.0)) == 0.5 * unique
    assert float(effective_data(1e6 * unique, unique, 12.0)) == pytest.approx(13 * unique)
    us = np.full(30, unique)
    exact = fit_surface(n, d, law_value("repeated", truth, n, d, us), us)
    for name, value in truth.items():
        assert exact.params[name] == pytest.approx(value, rel=1e-3), name
    y = law_value("repeated", truth, n, d, us) * np.exp(1e-3 * rng.standard_normal(30))
    law = fit(n, y, "repeated", d=d, unique=us)
    assert law.converged, law.reason
    for name in ("r_star", "alpha", "beta", "E"):
        assert law.intervals[name][0] <= truth[name] <= law.intervals[name][1], name
    assert law.aicc < fit_surface(n, d, y).aicc - 10
    at = law.at(4e9, d=400 * unique, unique=unique)
    assert at.low < float(law_value("repeated", truth, 4e9, 400 * unique, unique)) < at.high
    with pytest.raises(UserError, match="is of x, d, unique"):
        law.predict(1e9)
    fresh = fit(n, y, "repeated", d=d, unique=np.full(30, 1e13))
    assert "fewer than two token counts repeat" in fresh.reason
    free = fit_surface(n, d, law_value("chinchilla", truth, n, d), us)
    assert "nothing lost by repetition" in free.reason
    json.dumps(to_json(law), allow_nan=False)


def test_intervals_of_a_surface_cover() -> None:
    """Bootstrap by run, 25 runs of five sizes: 95 % intervals hold the truth in most of 24 studies."""
    truth = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
    rng, held = np.random.default_rng(5), dict.fromkeys(("E", "alpha", "beta", "split", "new"), 0)
    n, d = np.repeat(np.geomspace(5e7, 5e9, 5), 5), np.tile(np.geomspace(1e9, 1e11, 5), 5)
    for _ in range(24):
        law = fit_surface(n, d, law_value("chinchilla", truth, n, d) * np.exp(5e-3 * rng.standard_normal(25)), draws=50)
        assert law.converged, law.reason
        for name, value in (truth | {"split": 0.37 / 0.71}).items():
            if name in held:
                held[name] += law.intervals[name][0] <= value <= law.intervals[name][1]
        at = law.at(1e10, d=2e11)
        held["new"] += at.low <= float(law_value("chinchilla", truth, 1e10, 2e11)) * math.exp(5e-3 * rng.standard_normal()) <= at.high
    assert min(held.values()) >= 19, held


def test_an_interval_holds_its_own_estimate_however_small_the_noise() -> None:
    """Profile intervals of E and alpha, from exact points to 1 % of noise, few points and many."""
    rng = np.random.default_rng(8)
    for n in (6, 12, 60):
        x = np.geomspace(1e5, 1e11, n)
        exact = 2 + (x / 1e9) ** -0.3
        for noise in (0.0, 1e-6, 2e-4, 1e-2):
            law = fit(x, exact * np.exp(noise * rng.standard_normal(n)), "power_floor", outliers=False)
            assert law.converged, law.reason
            for name in ("E", "alpha", "a"):
                low, high = law.intervals[name]
                assert low <= law.params[name] <= high, (n, noise, name)
    held = 0
    for _ in range(60):
        law = fit(x, exact * np.exp(2e-4 * rng.standard_normal(60)), "power_floor", outliers=False)
        held += law.intervals["E"][0] <= 2 <= law.intervals["E"][1]
    assert held >= 52


def test_a_known_floor_gives_intervals_of_the_losss_own_noise() -> None:
    """Paper's ladder, E = 4.5 given, noise of 0.2 % of the loss: a new run at twice the size is held as often as promised."""
    rng, held = np.random.default_rng(12), 0
    n = 73728.0 * np.array([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30]) ** 3
    law_of = lambda size: 4.5 + (2 * size / 1e9) ** -0.23  # noqa: E731
    for _ in range(300):
        law = fit(n, law_of(n) * np.exp(2e-3 * rng.standard_normal(12)), floor=4.5, outliers=False)
        at = law.at(2 * n[-1])
        held += at.low <= law_of(2 * n[-1]) * math.exp(2e-3 * rng.standard_normal()) <= at.high
    assert 274 <= held <= 297, held


def test_what_does_not_determine_the_law_is_no_result() -> None:
    """Sizes and tokens in proportion, three token counts for a law of repetition, many passes alone, one column twice: each says so."""
    rng = np.random.default_rng(6)
    truth = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37, "r_star": 12.0}
    n = np.geomspace(5e7, 5e9, 12)
    for k in range(8):
        d = (20 if k % 2 else 1) * n
        law = fit(n, law_value("chinchilla", truth, n, d) * np.exp(2e-3 * rng.standard_normal(12)), "chinchilla", d=d)
        assert not law.converged
    unique = 8.7e8
    for passes in ((1, 8, 64), (50, 100, 200, 400)):
        for _ in range(2):
            n, d = np.repeat(np.geomspace(2e7, 2e9, 5), len(passes)), np.tile(unique * np.array(passes), 5)
            us = np.full(len(n), unique)
            law = fit_surface(n, d, law_value("repeated", truth, n, d, us) * np.exp(1e-3 * rng.standard_normal(len(n))), us)
            assert not law.converged, (passes, law.params)
            assert any(words in law.reason for words in ("do not determine", "at a bound", "at its upper bound")), law.reason


def test_a_passage_too_wide_for_the_sizes_is_no_break() -> None:
    """The true exponents lie beyond the points: no result, and an unbroken law is seldom given a break that its AICc would keep."""
    rng = np.random.default_rng(2)
    x = np.geomspace(1e6, 1e9, 20)
    wide = {"E": 0.0, "a": 3.0, "alpha_1": 0.15, "alpha_2": 0.05, "x_break": 3e7, "width": 3.0}
    made = [fit(x, law_value("broken_power", wide, x) * np.exp(5e-4 * rng.standard_normal(20)), "broken_power") for _ in range(10)]
    assert sum(law.converged for law in made) <= 1 and any("wider" in law.reason for law in made)
    kept = 0
    for _ in range(40):
        y = 3 * (x / 1e6) ** -0.1 * np.exp(2e-3 * rng.standard_normal(20))
        kept += fit(x, y, "broken_power").aicc < fit(x, y).aicc - 2
    assert kept <= 6


def test_outliers_of_a_surface_and_none_where_there_is_none() -> None:
    """Diverged runs among twenty are left out and the intervals stay narrow; clean tables of all forms keep their rows."""
    rng = np.random.default_rng(14)
    truth = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
    n, d = np.repeat(np.geomspace(5e7, 5e9, 5), 4), np.tile(np.geomspace(1e9, 1e11, 4), 5)
    y = law_value("chinchilla", truth, n, d) * np.exp(3e-3 * rng.standard_normal(20))
    y[4], y[11] = 1.5 * y[4], 3 * y[11]
    law = fit(n, y, "chinchilla", d=d)
    assert [(row, code) for row, code, _ in law.excluded] == [("4", "outlier"), ("11", "outlier")]
    assert law.converged and law.intervals["A"][1] < 1e4 and law.params["split"] == pytest.approx(0.52, abs=0.1)
    n, d, loss = chinchilla_data()
    assert fit(n, loss, "chinchilla", d=d).excluded == ()
    ladder = 73728.0 * np.array([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30]) ** 3
    lost = sum(bool(fit(ladder, (4.5 + (2 * ladder / 1e9) ** -0.23) * np.exp(2e-3 * rng.standard_normal(12)), "power_floor").excluded)
               for _ in range(60))  # fmt: skip
    assert lost <= 2


def test_bad_calls_of_the_api() -> None:
    for call, words in ((lambda: fit([[1.0, 2.0]], [1.0]), "lists of numbers"), (lambda: fit(["a", "b"], [1.0, 2.0]), "must be numbers"),
                        (lambda: fit([1.0, 2.0], [1.0, 2.0], floor=-5.0), "negative")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            call()
