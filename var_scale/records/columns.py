"""Columns of numbers for a fit, from a study, a table of records or any CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from var_scale.errors import UserError
from var_scale.records.cells import number, shown
from var_scale.records.gate import Exclusion, best_of_variants, gate
from var_scale.records.record import METRICS, RunRecord
from var_scale.records.runs_csv import FIELDS, is_runs_csv, read_rows, read_runs_csv, require_column

N = "N"
"""Name of the column of records that their study takes as N."""


class Columns(NamedTuple):
    """Points of a fit, each list (n,), and the runs that the gate excluded."""

    variables: list[list[float]]
    values: list[float]
    names: list[str]
    excluded: tuple[Exclusion, ...] = ()
    weights: list[float] | None = None
    """Of the rows, (n,), where a column of weights was named."""
    training: tuple[str, ...] = ()
    """Runs whose values are of the training data."""
    counted: str = ""
    """The column that their study takes as N; empty for a CSV that is not a table of records."""


def study_columns(study: Path, x: list[str], y: str) -> Columns:
    """Columns of the runs that pass the gate, one row per run.

    With one variable the runs that the laws of the report take (`best_of_variants`); a surface
    takes all of them.

    Args:
        study: a study folder with a report, or a table of records.
        x: columns of numbers, or N for what the study takes as N.

    Raises:
        UserError: code `records.table-missing`, `records.table-column` or `records.sizes-mixed`.
    """
    table = study / "report" / "runs.csv" if study.is_dir() else study
    if not table.exists():
        raise UserError(
            f"{study}: there is no report/runs.csv; give a CSV file, or the folder of a study with "
            "a report, such as runs/tiny",
            code="records.table-missing",
        )
    numbers = [field.name for field in FIELDS if field.type in ("int", "float")]
    for name, known in (*((name, [N, *numbers]) for name in x), (y, numbers)):
        if name not in known:
            raise UserError(
                f"{study}: there is no column {name} of numbers; columns: {', '.join(known)}",
                code="records.table-column",
            )
    result = gate(read_runs_csv(table), metrics=(y,) if y in METRICS else METRICS)
    kept, excluded = result.kept, result.excluded
    if len(x) == 1:
        kept, beaten = best_of_variants(kept)
        excluded += beaten
        _require_one_size(study, kept, x[0])
    return Columns(
        [[_count(run, name) for run in kept] for name in x],
        [run.metric(y) for run in kept],
        [run.name for run in kept],
        excluded,
        training=tuple(run.name for run in kept if run.split != "validation"),
        counted=kept[0].counted if kept else "",
    )


def _count(run: RunRecord, name: str) -> float:
    """A column of a record, or what its study takes as N."""
    return float(run.n if name == N else getattr(run, name))


def of_n(table: Path) -> str:
    """The column that N is in a study or a table of records; N itself in any other CSV."""
    path = table / "report" / "runs.csv" if table.is_dir() else table
    if not path.exists() or not is_runs_csv(path):
        return N
    return next((run.counted for run in read_runs_csv(path)), N)


def _require_one_size(study: Path, runs: Sequence[RunRecord], x: str) -> None:
    """Runs of equal x are repeats of one size, of which a law of x takes the mean."""
    sizes: dict[float, RunRecord] = {}
    for run in runs:
        other = sizes.setdefault(_count(run, x), run)
        if other.params_paper != run.params_paper:
            raise UserError(
                f"{study}: {other.name} and {run.name} have the same {x} and different sizes, so "
                f"there is no law of {x} alone; use --x N, or --form chinchilla with "
                "--x N,D",
                code="records.sizes-mixed",
            )


def read_columns(path: Path, names: list[str], y: str, weights: str = "") -> Columns:
    """Columns of a CSV by their names, each point named by its line; `weights` may name a further
    one.

    An empty y, nan or inf is a run without a result and becomes NaN or infinite; anything else that
    is not a number is an error.

    Raises:
        UserError: code `records.table-empty`, `records.table-separator`, `records.table-column`,
            or `records.table-cell`, naming line and column.
    """
    columns, rows = read_rows(path)
    given = [*names, weights] if weights else names
    for name in (*given, y):
        require_column(path, columns, name)
    found = Columns([[] for _ in given], [], [])
    for line, row in rows:
        for values, name in zip(found.variables, given, strict=True):
            values.append(_number(path, line, name, row[name]))
            if not 0 < values[-1] < math.inf:
                raise UserError(
                    f"{path}: line {line}: {name}={shown(row[name])} is not a positive number; "
                    "correct the line",
                    code="records.table-cell",
                )
        found.values.append(_number(path, line, y, (row[y] or "").strip() or "nan"))
        found.names.append(f"line {line}")
    if weights:
        return found._replace(variables=found.variables[:-1], weights=found.variables[-1])
    return found


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    """The number in a cell; an empty cell is an error."""
    try:
        return number(text or "")
    except ValueError:
        raise UserError(
            f"{path}: line {line}: {name}={shown(text)} is not a number; correct the line",
            code="records.table-cell",
        ) from None
