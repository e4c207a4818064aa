"""How often the intervals of real training runs hold the truth.

The study `study/truth-coverage` is trained with one teacher after another, each with other seeds.
`python -m tools.truth_coverage [TEACHERS]` writes the table of docs/explanation/intervals.md. Its
studies are in runs/teachers; the same command continues one that was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var_scale.config.load import load
from var_scale.files import read_json, replace_between
from var_scale.progress import say
from var_scale.study.run import run_study

RUNS = Path("runs/teachers")
PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "intervals.md"
START, END = "<!-- truth coverage: begin -->", "<!-- truth coverage: end -->"


class Row(NamedTuple):
    """One interval of every study that has a law of this loss."""

    label: str
    inside: list[bool]
    below: list[bool]
    """Whether the interval lies below the truth."""
    misses: list[float]
    """Estimate / truth - 1."""
    widths: list[float]
    """Width of the interval / truth."""

    def cells(self, studies: int) -> str:
        """The row of the table."""
        held, laws = sum(self.inside), len(self.inside)
        low = sum(self.below)
        return (
            f"| {self.label} | {laws} of {studies} | {held} of {laws} | {low} below, "
            f"{laws - held - low} above | {100 * float(np.median(self.misses)):+.2f} % | "
            f"{100 * float(np.median(self.widths)):.1f} % |"
        )


def study_of(teacher: int) -> Path:
    """Train the study with this teacher, whose number is also the seed of its runs; the folder of
    its report."""
    changes = [f"name=teacher-{teacher:02d}", f"data.teacher.seed={teacher}"]
    return run_study(load("study/truth-coverage", [*changes, f"study.seeds=[{teacher}]"]), RUNS)


def rows(reports: list[Path]) -> list[Row]:
    """The exact floor of every scale in the interval of its law, and the largest size in the
    interval of its prediction."""
    truths: list[list[dict[str, Any]]] = [read_json(r / "truth.json", "truth") for r in reports]
    found = []
    for place, first in enumerate(truths[0]):
        values = [
            (truth[place]["exact"], truth[place]["fit"]["params"]["E"], ends)
            for truth in truths
            if (ends := truth[place]["fit"]["intervals"].get("E"))
        ]
        found.append(_row(f"E of {first['name']}", values))
    held = [
        held
        for report in reports
        for held in read_json(report / "fit.json", "fit")["holdouts"]
        if (held["metric"], held["form"]) == ("loss_avg", "chinchilla") and held["predicted"]
    ]
    predicted = [(h["measured"], h["predicted"], (h["low"], h["high"])) for h in held]
    return [*found, _row("average loss of d7", predicted)]


def _row(label: str, values: list[tuple[float, float, tuple[float, float]]]) -> Row:
    return Row(
        label,
        [low <= truth <= high for truth, _, (low, high) in values],
        [high < truth for truth, _, (_, high) in values],
        [estimate / truth - 1 for truth, estimate, _ in values],
        [(high - low) / truth for truth, _, (low, high) in values],
    )


def table(reports: list[Path]) -> str:
    """The table of the page."""
    lines = [
        "| interval of | laws | holds the truth | misses | median error | median width |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *(row.cells(len(reports)) for row in rows(reports))])


if __name__ == "__main__":
    reports = []
    for teacher in range(1, 1 + (int(sys.argv[1]) if len(sys.argv) > 1 else 20)):
        reports.append(study_of(teacher))
        say(f"after {teacher} teachers:\n{table(reports)}")
    text = f"{table(reports)}\n\n{len(reports)} teachers."
    PAGE.write_text(replace_between(PAGE.read_text(), START, END, text))
