"""How often the intervals of real training runs hold the truth.

`python -m tools.truth_coverage [TEACHERS]` trains the study `study/truth-coverage` with one teacher
after another, each with other seeds, and adds the results to tools/truth_coverage.csv, from which
`make docs` makes the table of docs/explanation/intervals.md. Teachers of the table are skipped. The
studies are in runs/teachers; the same command continues one that was stopped.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var_scale.config.load import load
from var_scale.files import read_json, replace_between
from var_scale.progress import say
from var_scale.study.run import run_study

RUNS = Path("runs/teachers")
TABLE = Path(__file__).with_name("truth_coverage.csv")
PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "intervals.md"
START, END = "<!-- truth coverage: begin -->", "<!-- truth coverage: end -->"


class Row(NamedTuple):
    """One interval of one study."""

    teacher: int
    interval: str
    """What it is an interval of."""
    truth: float
    """The exact loss, or the measured one of d7."""
    sampled: float
    """The same on the study's validation tokens, which the interval is about: the choice of these
    tokens moves all losses of a study together."""
    estimate: float
    """NaN without a law, as are both ends."""
    low: float
    high: float


def results(teacher: int, report: Path) -> Iterator[Row]:
    """The exact floor of every scale beside its law, and the largest size beside its prediction."""
    for truth in read_json(report / "truth.json", "truth"):
        params, intervals = truth["fit"]["params"], truth["fit"]["intervals"]
        ends = intervals.get("E") or (math.nan, math.nan)
        values = (truth["exact"], truth["validation"], params.get("E"), *ends)
        yield _row(teacher, f"E of {truth['name']}", *values)
    holdouts = read_json(report / "fit.json", "fit")["holdouts"]
    of_surface = [h for h in holdouts if (h["metric"], h["form"]) == ("loss_avg", "chinchilla")]
    held = of_surface[0] if of_surface else {}
    names = ("measured", "measured", "predicted", "low", "high")
    yield _row(teacher, "average loss of d7", *(held.get(name) for name in names))


def _row(teacher: int, interval: str, *values: Any) -> Row:
    return Row(teacher, interval, *(math.nan if v is None else round(v, 5) for v in values))


def known() -> list[Row]:
    """The rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return [
            Row(int(row.pop("teacher")), row.pop("interval"), **{k: float(row[k]) for k in row})
            for row in csv.DictReader(file)
        ]


def add(rows: list[Row]) -> None:
    """Append rows to the table."""
    new = not TABLE.exists()
    with TABLE.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(Row._fields)
        writer.writerows(rows)


def markdown(rows: list[Row]) -> str:
    """How many intervals hold the truth, their median width and the median error."""
    heads = (
        "interval of",
        "studies",
        "without a law",
        "holds it",
        "too low",
        "too high",
        "holds the exact E",
        "median error",
        "median width",
    )
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name in dict.fromkeys(row.interval for row in rows):
        every = [row for row in rows if row.interval == name]
        some = [row for row in every if not math.isnan(row.estimate)]
        low = sum(row.high < row.sampled for row in some)
        high = sum(row.low > row.sampled for row in some)
        exact = sum(row.low <= row.truth <= row.high for row in some)
        # The loss of d7 has no exact value.
        of_exact = exact if name.startswith("E of") else "n/a"
        counts = [len(every), len(every) - len(some), len(some) - low - high, low, high, of_exact]
        error = np.median([row.estimate / row.sampled - 1 for row in some]) if some else math.nan
        width = np.median([(row.high - row.low) / row.truth for row in some]) if some else math.nan
        cells = [name, *map(str, counts), f"{100 * error:+.2f} %", f"{100 * width:.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The page with its table."""
    text = markdown(known()) if known() else "No teacher has been trained for this table yet."
    return replace_between(PAGE.read_text(), START, END, text)


if __name__ == "__main__":
    for teacher in range(1, 1 + (int(sys.argv[1]) if len(sys.argv) > 1 else 20)):
        if teacher not in {row.teacher for row in known()}:
            changes = [f"name=teacher-{teacher:02d}", f"data.teacher.seed={teacher}"]
            config = load("study/truth-coverage", [*changes, f"study.seeds=[{teacher}]"])
            add(list(results(teacher, run_study(config, RUNS))))
            say(f"after {teacher} teachers:\n{markdown(known())}")
