"""Figures: their data, their formats."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from var_scale.records.analyse import StudyResult
from var_scale.report.plots import FIGURES, figure_data
from var_scale.report.theme import figure, look, save


def series(drawn: object) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The points of each series of a figure, by panel and label."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(figure_data(drawn))):
        points = found.setdefault((row["panel"], row["series"]), [])
        points.append((float(row["x"]), float(row["y"])))
    return found


def test_data_of_the_isoflop_figure(fitted_grid: StudyResult) -> None:
    """The runs of each budget, its parabola, and its minimum."""
    assert fitted_grid.isoflop is not None
    found = {
        label: points for (_, label), points in series(FIGURES["isoflop"](fitted_grid)).items()
    }
    for curve in fitted_grid.isoflop.curves:
        name = f"{curve.flops:.2g} FLOP"
        assert [x for x, _ in found[name]] == pytest.approx(curve.sizes)
        assert [y for _, y in found[name]] == pytest.approx(curve.losses)
        assert found[f"minimum at {name}"][0] == pytest.approx((curve.best_n, curve.best_loss))
        lowest = min(y for _, y in found[f"parabola at {name}"])
        assert lowest == pytest.approx(curve.best_loss, rel=1e-3)


def test_data_of_the_law_figure(fitted_ladder: StudyResult) -> None:
    """Four panels; measured and held-out runs; the law passes through its own values."""
    found = series(FIGURES["laws"](fitted_ladder))
    assert len({panel for panel, _ in found}) == 4
    (panel,) = {panel for panel, _ in found if panel.startswith("$L_{avg}$")}
    sizes = [run.params_paper for run in fitted_ladder.gate.kept]
    measured, held = found[panel, "measured"], found[panel, "held out, measured"]
    assert [x for x, _ in measured + held] == pytest.approx(sizes) and len(held) == 1
    (line,) = [points for (p, label), points in found.items() if p == panel and "alpha" in label]
    fit = fitted_ladder.fits["loss_avg", "power"]
    assert [y for _, y in line] == pytest.approx(fit.predict([x for x, _ in line]), rel=1e-6)


def test_figures_without_data(fitted_ladder: StudyResult) -> None:
    """A ladder of one length has no isoFLOP curves."""
    assert FIGURES["isoflop"](fitted_ladder) is None


def test_formats(tmp_path: Path) -> None:
    """SVG and PDF on request, the same bytes each time; a vector file that is not written again is
    removed."""

    def draw(*formats: str) -> dict[str, bytes]:
        with look():
            drawn, axes = figure(1, 1, (2, 2))
            axes[0, 0].plot([1, 2], [3, 4])
            assert save(drawn, tmp_path, "a", formats) == tmp_path / "a.png"
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    files = draw("png", "svg", "pdf")
    assert files.keys() == {"a.png", "a.svg", "a.pdf"}
    assert files["a.png"].startswith(b"\x89PNG") and files["a.pdf"].startswith(b"%PDF")
    assert b"<svg" in files["a.svg"]
    assert draw("svg", "pdf") == files
    assert draw().keys() == {"a.png"}
