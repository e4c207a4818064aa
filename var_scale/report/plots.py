"""The pictures of a study's laws, each with its numbers as CSV; no display is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.files import write_text
from var_scale.records.analyse import StudyResult
from var_scale.report.plots_compute import compute_figure, data_figure, isoflop_figure
from var_scale.report.plots_size import (
    laws_figure,
    per_scale_figure,
    residuals_figure,
    ridge_figure,
)
from var_scale.report.theme import look, save

FIGURES = {
    "laws": laws_figure,
    "ridge": ridge_figure,
    "compute": compute_figure,
    "data": data_figure,
    "isoflop": isoflop_figure,
    "residuals": residuals_figure,
    "per_scale": per_scale_figure,
}
"""Every figure by its file name. A function returns None where it has nothing to show."""


def write_plots(
    result: StudyResult, folder: Path, formats: Sequence[str] = ("png",)
) -> dict[str, Path]:
    """Write NAME.png and NAME.csv, and NAME.svg and NAME.pdf where `formats` lists them.

    Returns:
        The PNG of every figure that has something to show; none without a healthy run.
    """
    if not result.gate.kept:
        return {}
    written: dict[str, Path] = {}
    with look():
        for name, draw in FIGURES.items():
            if (drawn := draw(result)) is not None:
                written[name] = save(drawn, Path(folder), name, formats)
                write_text(Path(folder) / f"{name}.csv", figure_data(drawn))
    return written


def figure_data(drawn: Any) -> str:
    """The numbers of a figure as CSV: panel, series, x, y of every line and set of points."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["panel", "series", "x", "y"])
    for axis in drawn.axes:
        for number, line in enumerate(axis.lines):
            label = str(line.get_label()).replace("\n", "; ")
            # matplotlib's own labels of unnamed lines start with an underscore.
            name = f"line {number}" if label.startswith("_") else label
            xs, ys = (np.asarray(v, float).tolist() for v in (line.get_xdata(), line.get_ydata()))
            for x, y in zip(xs, ys, strict=True):
                writer.writerow([axis.get_title(), name, f"{x:.8g}", f"{y:.8g}"])
    return out.getvalue()
