"""A table of records as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from var_scale.errors import UserError
from var_scale.files import csv_rows, require_content, write_text
from var_scale.records.cells import listed, number, shown
from var_scale.records.record import CurvePoint, RunRecord

FIELDS = fields(RunRecord)


def write_runs_csv(records: Sequence[RunRecord], path: Path) -> None:
    """Write one line per run; lists and the curve are JSON inside a cell.

    `read_runs_csv` returns equal records.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in FIELDS])
    for record in records:
        writer.writerow([_text(getattr(record, field.name)) for field in FIELDS])
    write_text(Path(path), out.getvalue())


def read_table(path: Path) -> str:
    """The text of a CSV file.

    Raises:
        UserError: code `records.table-missing`, `file.lfs-pointer` or `records.table-encoding`.
    """
    require_content(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: this table does not exist; give a CSV file or a study folder with a report",
            code="records.table-missing",
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: this is not a text file in UTF-8; give a CSV file",
            code="records.table-encoding",
        ) from None


def is_runs_csv(path: Path) -> bool:
    """Whether a CSV file has the columns of a table of records."""
    columns, _ = csv_rows(read_table(path).partition("\n")[0], path)
    return {field.name for field in FIELDS if field.default is MISSING} <= set(columns)


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The column names of a table, and its rows as `csv_rows` gives them.

    Raises:
        UserError: code `records.table-empty`, `records.table-separator`, `file.csv-quote`, or
            `records.table-cell` for a line with more cells than the header.
    """
    columns, rows = csv_rows(read_table(path), path)
    if not columns:
        raise UserError(
            f"{path}: this file is empty; give a CSV file with a line of column names",
            code="records.table-empty",
        )
    if len(columns) == 1 and (mark := next((m for m in ";\t|" if m in columns[0]), "")):
        separator = "tabs" if mark == "\t" else f"the separator is {mark}"
        raise UserError(
            f"{path}: commas do not separate its columns ({separator}); write it as a CSV with "
            "commas",
            code="records.table-separator",
        )
    for line, row in rows:
        # The cells beyond the last column are under the key None.
        if more := row.get(None):  # type: ignore[call-overload]
            raise UserError(
                f"{path}: line {line} has more cells than the header, after the column "
                f"{shown(columns[-1])}: {shown(more[0])}; correct the line",
                code="records.table-cell",
            )
    return columns, rows


def require_column(path: Path, columns: list[str], name: str) -> None:
    """Refuse a table that has the column `name` not at all or twice.

    Raises:
        UserError: code `records.table-column`.
    """
    if columns.count(name) == 1:
        return
    count = "no column" if name not in columns else "more than one column"
    raise UserError(
        f"{path}: there is {count} {listed([name])}; columns: {listed(columns)}",
        code="records.table-column",
    )


def read_runs_csv(path: Path) -> list[RunRecord]:
    """Records from a table that `write_runs_csv`, or the user, wrote.

    Columns that later versions added may be missing.

    Raises:
        UserError: code `records.table-column` or `records.table-cell`, naming line and column.
    """
    records = []
    columns, rows = read_rows(path)
    for field in FIELDS:
        if field.default is MISSING or field.name in columns:
            require_column(path, columns, field.name)
    for line, row in rows:
        values: dict[str, Any] = {}
        for field in FIELDS:
            cell = row.get(field.name)
            if cell is None:
                if field.default is not MISSING and field.name not in columns:
                    continue
                raise UserError(
                    f"{path}: line {line} has too few cells: {field.name} is missing; correct the "
                    "line",
                    code="records.table-column",
                )
            try:
                values[field.name] = _value(cell, str(field.type))
            except (ValueError, TypeError, OverflowError, RecursionError):
                raise UserError(
                    f"{path}: line {line}, column {field.name}: {shown(cell)} is not of the "
                    f"type {field.type}; correct the line",
                    code="records.table-cell",
                ) from None
        records.append(RunRecord(**values))
    return records


def _text(value: Any) -> Any:
    """A cell; repr keeps every digit of a float."""
    if isinstance(value, tuple):
        return json.dumps(value)
    return repr(value) if isinstance(value, float) else value


def _value(cell: str, kind: str) -> Any:
    if kind == "str":
        return cell
    if kind in ("int", "float"):
        value = number(cell)
        # Compute may exceed any limit that a person's count has, so int, and not `whole`.
        return int(cell) if kind == "int" else value
    make: Any = _point if "CurvePoint" in kind else float
    return tuple(make(value) for value in json.loads(cell or "[]"))


def _point(values: Sequence[float]) -> CurvePoint:
    step, *others = values
    return CurvePoint(int(step), *map(float, others))
