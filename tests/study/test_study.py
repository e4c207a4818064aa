"""Records, gate, hold-out, frontier, plan and report on made-up studies."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import LAWS, PATCHES, ladder, law, record, shape, write_folder

from var_scale.config.load import config_root
from var_scale.errors import UserError
from var_scale.study.analyse import fit_study, laws_of_data, seed_noise
from var_scale.study.frontier import FrontierPoint, fit_frontier, pareto
from var_scale.study.gate import gate
from var_scale.study.holdout import hold_out
from var_scale.study.isoflop import fit_isoflop, sentences
from var_scale.study.laws import law_value
from var_scale.study.optimum import best_surface, fit_surfaces, optimum
from var_scale.study.plan import plan_rows, print_plan, short
from var_scale.study.power import fit_law, ridge_regions
from var_scale.study.record import METRICS, RunRecord, read_run, read_runs_csv, read_study, write_runs_csv
from var_scale.study.report import write_report


def test_run_folder_becomes_the_record(tmp_path: Path) -> None:
    run = record(4, seed=1, noise=0.01, restarts=2)
    write_folder(run, tmp_path / "study" / run.name)
    assert read_run(tmp_path / "study" / run.name) == run
    write_folder(record(2), tmp_path / "study" / "d2")
    assert [r.depth for r in read_study(tmp_path / "study")] == [2, 4]


def test_run_without_an_end_has_a_record(tmp_path: Path) -> None:
    run = record(4)
    write_folder(run, tmp_path / "r")
    rows = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join(rows[:6]) + '\n{"kind": "tr')
    (tmp_path / "r" / "status.json").write_text('{"state": "running", "reason": ""}')
    found = read_run(tmp_path / "r")
    assert math.isnan(found.loss_avg)
    assert found.images == run.images * 3 // 8
    assert found.final_lr_fraction == pytest.approx(1 - 300 / 800)
    assert gate([found]).excluded[0].code == "incomplete"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no run has started"):
        read_study(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match="depth is missing"):
        read_run(tmp_path)


def test_csv_gives_equal_records_back(tmp_path: Path) -> None:
    runs = ladder((2, 3))
    write_runs_csv(runs, tmp_path / "runs.csv")
    assert read_runs_csv(tmp_path / "runs.csv") == runs
    text = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(text.replace("complete", "complete", 1).replace(",100000,", ",many,", 1))
    with pytest.raises(UserError, match=r"line 2, column images: 'many' is not a int"):
        read_runs_csv(tmp_path / "runs.csv")


def test_gate_codes() -> None:
    good = [record(d) for d in (2, 3, 5)]
    nan = {m: math.nan for m in METRICS}
    bad = {
        "incomplete": record(4, state="running"),
        "diverged": record(4, state="diverged", reason="the loss is nan"),
        "failed": record(4, state="failed"),
        "non_finite": record(4, loss_last=math.inf),
        "not_annealed": record(4, final_lr_fraction=0.5),
        "missing_evaluation": record(4, eval_samples=0, **nan),
        "worse_than_smaller": record(4, loss_avg=good[1].loss_avg * 1.02),
        "data_differs": record(4, data_hash="other"),
    }
    for code, run in bad.items():
        result = gate([*good, run])
        assert [(e.code, e.record) for e in result.excluded] == [(code, run)]
        assert result.kept == tuple(good)
    assert gate([*good, record(4, loss_avg=good[1].loss_avg * 1.002)]).excluded == ()
    assert gate([*good, record(4, final_lr_fraction=math.nan)]).excluded[0].code == "not_annealed"
    assert gate([]).kept == ()


def test_hold_out_predicts_the_largest() -> None:
    runs = ladder(noise=0.001)
    for metric in METRICS:
        held = hold_out(runs, metric)
        assert held.held == ("d8-s0",)
        assert held.fit is not None
        assert "d8-s0" not in held.fit.rows
        assert abs(held.relative_error) < 0.01
        assert held.inside
        assert held.fit.excluded == (("d8-s0", "held_out", "the largest size, kept out to test the law"),)
        assert held.fit.params["alpha"] == pytest.approx(LAWS[metric][1], abs=0.004)
    far = replace(runs[-1], loss_avg=runs[-1].loss_avg * 1.1)
    assert not hold_out([*runs[:-1], far], "loss_avg").inside


def test_hold_out_keeps_all_seeds_of_the_largest_out() -> None:
    runs = [record(d, seed=s, noise=0.002) for d in (2, 3, 4, 6) for s in (0, 1)]
    held = hold_out(runs, "loss_last")
    assert held.held == ("d6-s0", "d6-s1")
    assert held.measured == pytest.approx(math.sqrt(runs[-1].loss_last * runs[-2].loss_last))
    assert held.fit and held.fit.rows == ("d2-s0+d2-s1", "d3-s0+d3-s1", "d4-s0+d4-s1")
    assert 0.0005 < seed_noise(runs, "loss_last") < 0.005
    assert math.isnan(seed_noise(runs[::2], "loss_last"))


def test_seeds_of_a_size_are_one_point_of_a_fit() -> None:
    """Three seeds that all miss the law together do not shrink the interval as nine independent points would."""
    bend = {2: 0.01, 3: -0.01, 4: -0.01, 6: 0.01}
    one = [record(d, loss_avg=law("loss_avg", record(d).params_paper) * math.exp(bend[d])) for d in bend]
    three = [replace(run, seed=s, name=f"{run.name}{s}") for run in one for s in (0, 1, 2)]
    low, high = (fit_study(runs).fits["loss_avg", "power"].intervals["alpha"] for runs in (one, three))
    assert low == pytest.approx(high)


def test_frontier_is_a_running_minimum() -> None:
    points = [FrontierPoint("a", c, v) for c, v in ((1.0, 5.0), (2.0, 6.0), (3.0, 4.0), (3.0, 3.0), (4.0, 3.0))]
    assert [(p.x, p.value) for p in pareto(points)] == [(1, 5), (3, 3)]
    runs = ladder(noise=0)
    front = fit_frontier(runs, "loss_avg")
    assert front.fit.converged
    assert min(front.fit.x) >= min(run.flops_exact for run in runs)
    assert front.alpha_interval is not None
    assert front.alpha_interval[0] < front.fit.params["alpha"] < front.alpha_interval[1]
    assert not fit_frontier([], "loss_avg").fit.converged


def test_full_fit_uses_all_sizes_and_both_forms() -> None:
    result = fit_study([*ladder(noise=0.001), record(7, state="failed")])
    assert len(result.fits) == len(result.holdouts) == 8
    fit = result.fits["loss_last", "power"]
    assert len(fit.rows) == 6
    assert fit.excluded[0][:2] == ("d7-s0", "failed")
    assert float(fit.predict(1e7)) == pytest.approx(law("loss_last", 1e7), rel=0.01)
    assert result.alpha_by_size["loss_avg"]["params_paper"] == pytest.approx(0.08, abs=0.003)
    json.dumps(result.to_json(), allow_nan=False)


def test_report_of_a_study(tmp_path: Path) -> None:
    runs = [*ladder(noise=0.001), record(7, state="diverged", reason="the loss is nan at step 10")]
    for run in runs:
        write_folder(run, tmp_path / "ladder" / run.name)
    page = write_report(tmp_path / "ladder", fit_study(read_study(tmp_path / "ladder")), {"Tokenizer": "patch <8>"})
    folder = tmp_path / "ladder" / "report"
    assert page == folder / "report.html"
    for name in ("laws", "ridge", "compute", "data", "residuals", "per_scale"):
        png = (folder / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 20_000
        assert "<svg" in (folder / f"{name}.svg").read_text()
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    html, text = page.read_text(), (folder / "report.md").read_text()
    assert html.count("data:image/png;base64,") == 6
    assert "patch &lt;8&gt;" in html
    assert 'src="http' not in html
    for words in ("8,192 samples", "`diverged`", "the loss is nan at step 10", "inside the interval", "fixed data budget", "(laws.png)",
                  "If nothing of it is irreducible (E = 0)", "with E left free it is", "of the gain from the next smaller size"):
        assert words in text
    fits = json.loads((folder / "fit.json").read_text())
    assert {fit["metric"] for fit in fits["fits"]} == set(METRICS)
    with open(folder / "runs.csv") as file:
        assert len(list(csv.DictReader(file))) == 7
    assert len(read_runs_csv(folder / "runs.csv")) == 7


@pytest.mark.parametrize("depths", [(), (2,), (2, 4)])
def test_too_few_runs_give_a_report_that_says_so(tmp_path: Path, depths: tuple[int, ...]) -> None:
    write_report(tmp_path / "small", fit_study([record(d) for d in depths]))
    text = (tmp_path / "small" / "report" / "report.md").read_text()
    assert "There is no law yet" in text
    assert "size" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan_rows([shape(d) for d in (2, 4)], 1000, device="cpu")
    assert [row.held_out for row in rows] == [False, True]
    assert rows[0].tokens == 1000 * sum(p * p for p in PATCHES)
    assert rows[1].flops > 4 * rows[0].flops
    assert plan_rows([shape(2)], 1000, run_seconds=[12.5])[0].seconds == 12.5
    print_plan(rows, "a guess")
    out = capsys.readouterr().out
    assert "times: a guess" in out and "device-hours" in out and "d4" in out
    print_plan(plan_rows([shape(2)], 1000, run_seconds=[12.5]), "timed")
    assert "device-hours" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no sizes"):
        plan_rows([], 10)
    with pytest.raises(UserError, match="2 images for 1 sizes"):
        plan_rows([shape(2)], [1, 2])
    assert (short(18492580), short(2010020356), short(42)) == ("18.5 M", "2.01 B", "42")


def test_rooms_start_without_torch_scipy_or_matplotlib() -> None:
    code = ("import sys, var_scale.cost, var_scale.study.report, var_scale.study.surface; "
            "print([m for m in ('torch', 'scipy', 'matplotlib', 'rich') if m in sys.modules])")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_points_of_a_grid_compete() -> None:
    """Of several runs of a size and seed the best enters the laws, the others are named; the frontier takes all."""
    runs = ladder()
    worse = [replace(run, name=f"{run.name}-lr", loss_avg=run.loss_avg * 1.004, curve=run.curve) for run in runs]
    alone, both = fit_study(runs), fit_study([*runs, *worse])
    assert both.gate.kept == alone.gate.kept and both.fits["loss_avg", "power"].params == alone.fits["loss_avg", "power"].params
    beaten = [item for item in both.gate.excluded if item.code == "beaten_variant"]
    assert sorted(item.record.name for item in beaten) == sorted(run.name for run in worse) and runs[0].name in beaten[0].text


def test_a_persons_word_is_stronger_than_the_gate() -> None:
    """Excluded with the reason; kept though not annealed; not kept where there is no value."""
    runs = ladder()
    runs[1] = replace(runs[1], final_lr_fraction=0.5)
    runs[2] = replace(runs[2], loss_avg=math.nan, loss_last=math.nan, err_avg=math.nan, err_last=math.nan)
    word = {"exclude": {runs[0].name: "another tokenizer"}, "keep": {runs[1].name: "constant on purpose", runs[2].name: "?"}}
    result = fit_study(runs, **word)
    codes = [(item.record.name, item.code) for item in result.gate.excluded]
    assert codes == [(runs[0].name, "by_hand"), (runs[2].name, "missing_evaluation")]
    assert runs[1] in result.gate.kept and result.gate.excluded[0].text == "another tokenizer"


def isoflop_runs(budgets: tuple[float, ...], sizes: int = 7) -> list[RunRecord]:
    """Runs of L = 1.7 + 400 N^-0.34 + 400 D^-0.34 with C = 6 N D, sizes about the optimum of each budget."""
    runs = []
    for budget in budgets:
        for k in range(sizes):
            n = (budget / 6) ** 0.5 * 2.0 ** (k - sizes // 2)
            d = budget / (6 * n)
            loss = 1.7 + 400 * n**-0.34 + 400 * d**-0.34
            runs.append(replace(record(4), name=f"c{budget:g}-{k}", params_paper=round(n), tokens=round(d), images=round(d) // 680,
                                flops_exact=round(budget), loss_avg=loss, curve=()))  # fmt: skip
    return runs


def test_isoflop_curves(tmp_path: Path) -> None:
    """Minima where the law has them, the exponent one half, from parabolas and surface; a minimum at the edge is no result; shown in the
    report with picture and data."""
    runs = isoflop_runs((1e17, 1e18, 1e19))
    found = fit_isoflop(runs)
    assert found is not None and [round(c.best_n / (c.flops / 6) ** 0.5, 2) for c in found.curves] == [1.0, 1.0, 1.0]
    assert found.exponent == pytest.approx(0.5, abs=0.01) and found.interval[0] <= found.exponent <= found.interval[1]
    assert found.split == pytest.approx(0.5, abs=0.02)
    assert "differ by" in " ".join(sentences(found))
    edge = [run for run in runs if not run.name.startswith("c1e+18") or int(run.name[-1]) < 3]
    again = fit_isoflop(edge)
    assert again is not None and "edge" in again.curves[1].reason and again.exponent == pytest.approx(0.5, abs=0.01)
    assert fit_isoflop(ladder()) is None
    result = fit_study(runs)
    write_report(tmp_path, result)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "IsoFLOP curves" in report and "optimal size from the parabolas" in report
    rows = (tmp_path / "report" / "isoflop.csv").read_text().splitlines()
    assert rows[0] == "panel,series,x,y" and sum("minimum" in row for row in rows) == 3
    assert (tmp_path / "report" / "laws.csv").exists()
    assert json.loads((tmp_path / "report" / "fit.json").read_text())["isoflop"]["exponent"] == pytest.approx(0.5, abs=0.01)


def test_what_each_step_up_the_ladder_was_worth_and_each_scale() -> None:
    """Predictions of the largest from 3, 4, ... sizes, the last of them the hold-out test itself; a law of every scale."""
    runs = ladder()
    result = fit_study(runs)
    curve = result.budget_curves["loss_avg"]
    assert [len(held.fit.x) for held in curve if held.fit] == [3, 4, 5] and all(held.held == (runs[-1].name,) for held in curve)
    assert curve[-1].prediction == result.holdouts["loss_avg", "power"].prediction
    assert len(result.by_scale["loss"]) == len(runs[0].loss_per_scale)
    for scale, fit in enumerate(result.by_scale["loss"]):
        expected = fit_law("power", [run.params_paper for run in runs], [run.loss_per_scale[scale] for run in runs])
        assert fit.converged == expected.converged and fit.params == expected.params


def test_the_summary_on_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real offline run: pictures, table, charts and numbers; a wandb that fails is a warning."""
    from types import SimpleNamespace

    import wandb

    from var_scale.cluster.summary import log_summary, numbers

    monkeypatch.setenv("WANDB_SILENT", "true")
    result = fit_study(ladder())
    write_report(tmp_path / "s", result)
    log = SimpleNamespace(wandb="offline", wandb_project="p", wandb_chart="me/scaling-law")
    study = SimpleNamespace(config=SimpleNamespace(name="s", log=log), report=tmp_path / "s" / "report")
    log_summary(study, result)  # type: ignore[arg-type]
    assert "run s-summary" in capsys.readouterr().out
    (folder,) = (tmp_path / "s" / "report" / "wandb").glob("offline-run-*s-summary")
    media = [path.name for path in folder.glob("files/media/**/*") if path.is_file()]
    assert sum("laws" in name for name in media) >= 1 and sum(name.endswith(".table.json") for name in media) >= 2
    chart = json.loads((config_root() / "wandb" / "scaling-law.json").read_text())  # every field that is logged has its place in the chart
    assert set(re.findall(r"\$\{field:(\w+)\}", json.dumps(chart))) == {"x", "y", "run", "kept"}
    assert numbers(result)["loss_avg/alpha"] == result.fits["loss_avg", "power"].params["alpha"]
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    log_summary(study, result)  # type: ignore[arg-type]
    assert "warning: wandb is not available" in capsys.readouterr().out


def test_the_best_size_for_a_compute(tmp_path: Path) -> None:
    """Where the law has its minimum, N = (C / 6)^0.5, in and beyond the study's compute; with data that repeat a larger model is better; in
    the report and in what to run next. A study of one length has none and says why."""
    runs = isoflop_runs((1e17, 1e18, 1e19))
    rng = np.random.default_rng(3)
    noisy = [replace(run, loss_avg=run.loss_avg * float(np.exp(5e-4 * rng.standard_normal()))) for run in runs]
    for records, close in ((runs, 0.02), (noisy, 0.3)):
        surface = best_surface(fit_surfaces(records))
        assert surface is not None and surface.form == "chinchilla"
        for budget, beyond in ((1e18, False), (1e20, True)):
            best = optimum(surface, records, budget)
            true = (budget / 6) ** 0.5
            assert best.n == pytest.approx(true, rel=close) and best.tokens == pytest.approx(budget / 6 / best.n, rel=1e-3)
            assert best.n_interval[0] <= true * 1.01 and best.n_interval[1] >= true * 0.99 and best.beyond == beyond
            loss = 1.7 + 400 * true**-0.34 * 2
            assert best.loss_interval[0] <= loss * 1.0001 and best.loss_interval[1] >= loss * 0.9999
            assert 0 < best.halved < 0.1 and 0 < best.doubled < 0.1 and math.isnan(best.epochs)
    unique = 2 * 10**8
    repeating = [replace(run, unique_tokens=unique, loss_avg=float(law_value(
        "repeated", {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.34, "r_star": 5.0}, run.params_paper, run.tokens, unique)))
        for run in runs]  # fmt: skip
    fits = fit_surfaces(repeating)
    surface = best_surface(fits)
    assert surface is not None and surface.form == "repeated" and surface.params["r_star"] == pytest.approx(5, rel=0.01)
    best = optimum(surface, repeating, 1e19)
    assert best.n > 1.2 * (1e19 / 6) ** 0.5 and best.epochs == pytest.approx(best.tokens / unique)
    write_report(tmp_path, fit_study(repeating))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "`repeated`: loss_avg = " in text and "(extrapolated)" in text
    assert json.loads((tmp_path / "report" / "fit.json").read_text())["optima"][1]["flops"] == pytest.approx(1e19)
    assert fit_study(ladder()).optima == () and "token counts" in fit_study(ladder()).surfaces["chinchilla"].reason


def test_laws_of_data() -> None:
    """Along tokens the frontier is the best of any size; a law of each size that was trained for three lengths."""
    runs = [
        replace(record(depth), name=f"d{depth}-{k}", tokens=k * 10**6, flops_exact=k * 10**6 * 6 * record(depth).params_paper,
                loss_avg=law("loss_avg", record(depth).params_paper) * (k / 8) ** -0.05, curve=())
        for depth in (2, 3, 4) for k in (1, 2, 4, 8)
    ]  # fmt: skip
    front = fit_frontier(runs, "loss_avg", along="tokens")
    assert [round(point.x) for point in front.points] == [1e6, 2e6, 4e6, 8e6] and {p.n for p in front.points} == {record(4).params_paper}
    assert front.fit.params["alpha"] == pytest.approx(0.05) and math.isnan(front.size_exponent)
    laws = laws_of_data(runs, "loss_avg", 0.0)
    assert [len(fit.x) for fit in laws] == [4, 4, 4] and all(fit.params["alpha"] == pytest.approx(0.05) for fit in laws)
    assert laws_of_data(ladder(), "loss_avg", 0.0) == ()
    along_compute = fit_frontier(runs, "loss_avg")
    assert 0 < along_compute.size_exponent < 3 and along_compute.size_interval is not None


def test_exponents_by_convention() -> None:
    """Counting FLOPs by 6 N D or by forward MACs moves the exponent of the frontier as the counts' own slopes say."""
    runs = ladder(noise=0)
    result = fit_study(runs)
    found = result.alpha_by_flops["loss_avg"]
    assert found["flops_exact"] == pytest.approx(result.frontiers["loss_avg"].fit.params["alpha"])
    assert found["flops_paper"] == pytest.approx(found["flops_exact"])  # a sixth of them everywhere
    assert found["flops_6nd"] != pytest.approx(found["flops_exact"], rel=1e-3)


def test_the_checklist_says_what_is_wrong() -> None:
    """Each answer turns with what it asks for."""
    from var_scale.study.report_trust import NO, OPEN, YES, answers

    def ask(runs: list[RunRecord]) -> dict[str, str]:
        return {question: answer for question, answer, _ in answers(fit_study(runs))}

    good = ask([*ladder((1, 2, 3, 4, 6, 8), noise=2e-4), *(record(d, seed=1, noise=2e-4) for d in (1, 2, 3, 4, 6, 8))])
    assert good["Do all runs enter?"] == good["Are there enough sizes, over a wide range?"] == YES
    assert good["Is the noise between seeds measured?"] == good["Did the law foresee the largest size?"] == YES
    assert good["Was the learning rate annealed everywhere?"] == YES
    assert good["Was the recipe tuned at every size?"] == OPEN == good["Is the evaluation large enough?"]
    poor = ask([*ladder((4, 5, 6), noise=5e-3), record(7, state="failed")])
    assert poor["Do all runs enter?"] == poor["Are there enough sizes, over a wide range?"] == NO
    assert poor["Is the noise between seeds measured?"] == poor["Is the irreducible part E known from the points?"] == NO
    bent = ladder((1, 2, 3, 4, 6, 8), noise=1e-4)
    assert ask(bent)["Do the points lie on a straight line?"] == YES
    missed = [*bent[:-1], replace(bent[-1], loss_avg=1.03 * bent[-1].loss_avg)]
    assert ask(missed)["Did the law foresee the largest size?"] == NO
    bent = [replace(run, loss_avg=3 + 0.6 * (run.params_paper / 1e6) ** -0.3) for run in bent]
    assert ask(bent)["Do the points lie on a straight line?"] == NO
    measured = [replace(run, sems=(0.1, 0.1, 0.1, 0.1)) for run in ladder()]
    assert ask(measured)["Is the evaluation large enough?"] == NO
    assert ask([replace(run, sems=(1e-3,) * 4) for run in ladder()])["Is the evaluation large enough?"] == YES


def test_the_ridge_of_floor_and_exponent() -> None:
    """The 95 % region holds the truth about as often as it says, and its ends agree with the profile intervals."""
    x = np.geomspace(1e6, 2e9, 10)
    rng, held = np.random.default_rng(9), 0
    for _ in range(60):
        y = (4.5 + (x / 5e8) ** -0.23) * np.exp(1e-3 * rng.standard_normal(10))
        fit = fit_law("power_floor", x.tolist(), y.tolist(), noise_floor=0)
        assert fit.converged
        region = ridge_regions(fit)
        low, high = (np.interp(4.5, region.floors, ends) for ends in region.most)
        held += bool(low <= 0.23 <= high)
        assert region.excess.min() < 0.1 and abs(float(region.best[region.excess.argmin()]) / fit.params["alpha"] - 1) < 0.02
        assert np.nanmin(region.most[0]) < np.nanmin(region.half[0]) < fit.params["alpha"] < np.nanmax(region.half[1])
        assert np.nanmin(region.most[0]) < fit.intervals["alpha"][0]  # of both together: wider than of one
    assert 52 <= held <= 60


def test_tables_of_before_are_read(tmp_path: Path) -> None:
    """runs.csv without the columns that came later."""
    runs = ladder()
    write_runs_csv(runs, tmp_path / "runs.csv")
    lines = [line.rsplit(",", 2)[0] for line in (tmp_path / "runs.csv").read_text().splitlines()]
    assert lines[0].endswith(",curve")
    (tmp_path / "old.csv").write_text("\n".join(lines) + "\n")
    assert read_runs_csv(tmp_path / "old.csv") == runs
