"""The report: its files, its text, its tables and its HTML page."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.synthetic_study import ladder, record
from var_scale.records.analyse import StudyResult, fit_study
from var_scale.records.record import METRICS
from var_scale.records.runs_csv import read_runs_csv
from var_scale.report.page import html_page
from var_scale.report.report import markdown, table, write_report
from var_scale.report.values import Plan


def test_files_of_a_report(tmp_path: Path, fitted_ladder: StudyResult) -> None:
    """Every figure as PNG with its data, the page with the pictures inside, and both tables."""
    folder = tmp_path / "ladder" / "report"
    folder.mkdir(parents=True)
    (folder / ".report.md.1.tmp").touch()  # of a report that was killed
    (folder / "laws.svg").touch()  # of an earlier report
    page = write_report(tmp_path / "ladder", fitted_ladder, {"Tokenizer": "patch <8>"})
    assert page == folder / "report.html"
    for name in ("laws", "ridge", "compute", "data", "residuals", "per_scale"):
        png = (folder / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 20_000
        assert (folder / f"{name}.csv").read_text().startswith("panel,series,x,y\n")
    assert not [path for path in folder.iterdir() if path.suffix in (".svg", ".pdf", ".tmp")]
    html, text = page.read_text(), (folder / "report.md").read_text()
    assert html.count("data:image/png;base64,") == 6
    assert "patch &lt;8&gt;" in html and "src=" not in html.replace('src="data:', "")
    assert "(laws.png)" in text
    fits = json.loads((folder / "fit.json").read_text())
    assert {fit["metric"] for fit in fits["fits"]} == set(METRICS)
    with open(folder / "runs.csv") as file:
        assert len(list(csv.DictReader(file))) == 7
    assert len(read_runs_csv(folder / "runs.csv")) == 7


@pytest.mark.parametrize("study", ["fitted_ladder", "fitted_grid"])
def test_no_space_before_a_full_stop(study: str, request: pytest.FixtureRequest) -> None:
    """Optional parts of sentences leave no gap behind."""
    text = markdown("s", request.getfixturevalue(study), {}, {}, None)
    sentences = re.sub(r"`[^`]*`|^\|.*$", "x", text, flags=re.MULTILINE)
    assert not re.findall(r"\w +[.,;](?!\d)", sentences)


def test_text_of_a_ladder(fitted_ladder: StudyResult) -> None:
    """The equation, the exponent, the hold-out test, the runs that are excluded, and the plan."""
    plan = Plan({"d2-s0": (90.0, 1.5e12)}, ["d9: 3 device-hours"])
    text = markdown("ladder", fitted_ladder, {"laws": "laws.png"}, {"Machine": "a | b"}, plan)
    fit = fitted_ladder.fits["loss_avg", "power"]
    held = fitted_ladder.holdouts["loss_avg", "power"]
    assert text.startswith("# Scaling study ladder\n")
    for value in (
        fit.equation,
        f"{fit.params['alpha']:.4f} (95 % interval {fit.intervals['alpha'][0]:.4f}",
        f"{100 * abs(held.relative_error):.2f} %",
        f"{100 * held.gain_fraction:.0f} %",
        "8,192 samples",
        "| d7-s0 | `diverged` |",
        "the loss is nan at step 10",
        "6 of 7",
        "- Machine: a | b",
        "| d2-s0 | 1.5e+12 | 2.51e+12 | 1 min 30 s | 2 min 00 s |",
        "- d9: 3 device-hours",
        "(laws.png)",
    ):
        assert value in text
    assert "per_scale" not in text and "IsoFLOP" not in text and "\n\n\n" not in text
    assert fitted_ladder.surfaces["chinchilla"].reason in text


def test_text_of_a_grid(fitted_grid: StudyResult) -> None:
    """IsoFLOP curves, laws of data, surfaces, and the best size for several budgets."""
    text = markdown("grid", fitted_grid, {"isoflop": "isoflop.png"}, {}, None)
    assert fitted_grid.isoflop is not None
    for value in (
        "IsoFLOP",
        "(isoflop.png)",
        f"N ~ C^{fitted_grid.isoflop.exponent:.3f}",
        "- `repeated`: loss_avg = ",
        "- `chinchilla`: loss_avg = ",
        "(extrapolated)",
        *(f"| {best.n:.3g} | {best.tokens:.3g} |" for best in fitted_grid.optima),
        "`beaten_variant`",
    ):
        assert value in text
    assert fitted_grid.to_json()["optima"][1]["flops"] == pytest.approx(1.6e18)


@pytest.mark.parametrize("depths", [(), (2,), (2, 4)])
def test_too_few_runs_give_a_report_with_the_reason(depths: tuple[int, ...]) -> None:
    """There is no law, and no number that is none."""
    result = fit_study([record(d) for d in depths])
    text = markdown("small", result, {}, {}, None)
    assert result.fits["loss_avg", "power"].reason in text
    assert "no law" in text and f"{len(depths)} of {len(depths)} runs" in text
    assert " nan" not in text.lower() and "None" not in text


def test_a_study_without_a_healthy_run_has_no_pictures(tmp_path: Path) -> None:
    """The other files are written."""
    write_report(tmp_path / "none", fit_study([record(2, state="failed")]))
    names = {path.name for path in (tmp_path / "none" / "report").iterdir()}
    assert names == {"report.md", "report.html", "runs.csv", "fit.json"}


def test_tables_and_pages(tmp_path: Path) -> None:
    """Columns of numbers are aligned to the right; a cell can hold a bar, a line break or HTML, and
    its row stays whole on the page; pictures are inside the page."""
    rows = [["a|b", 1.5, "12 s", "x"], ["c\nd", "n/a", "1 min 05 s", "<b>"]]
    text = table(["name", "value", "time", "note"], rows)
    assert text.splitlines()[1] == "| --- | ---: | ---: | --- |"
    assert len(text.splitlines()) == 4
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    html = html_page(f'# A & B\n\n{text}\n\n![a "b"](p.png)\n', tmp_path)
    assert "<title>A &amp; B</title>" in html
    assert html.count("<td") == 8 and "<td>a|b</td>" in html and "&lt;b&gt;" in html
    assert 'alt="a &quot;b&quot;" src="data:image/png;base64,' in html


def test_rooms_start_without_torch_scipy_or_matplotlib() -> None:
    """Commands that only read results load neither of them, nor the report's libraries."""
    heavy = ("torch", "scipy", "matplotlib", "rich", "jinja2", "markdown_it")
    code = (
        "import sys, var_scale.cost, var_scale.report.report, var_scale.laws.surface; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_study_too_small_for_a_hold_out_test() -> None:
    """Two or three sizes have a report that says what is missing."""
    for depths in ((2, 3), (2, 3, 4)):
        text = markdown("small", fit_study(ladder(depths)), {}, {}, None)
        assert "Can you trust it?" in text and "Did the law predict the largest size?" in text
