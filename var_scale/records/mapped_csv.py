"""Records from any CSV, with a mapping from fields to its columns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.records.cells import LARGEST, number, shown, whole
from var_scale.records.foreign import foreign_record
from var_scale.records.record import METRICS, RunRecord
from var_scale.records.runs_csv import read_rows, require_column

TEXTS = ("name", "data_hash")
WHOLE = {"depth": 1, "seed": 0, "images": 1, "tokens": 1}
"""Least value of each whole number."""
FIELDS = (*TEXTS, "depth", "seed", "images", "tokens", *METRICS, "final_lr_fraction", "seconds")


def read_mapped_csv(path: Path, mapping: dict[str, str]) -> list[RunRecord]:
    """One record per row of a CSV.

    Args:
        mapping: field of a record -> column. Needed are depth and loss_avg or loss_last. Images and
            tokens follow from each other through the model's length L; other fields have neutral
            values.

    Raises:
        UserError: code `records.map-field`, or as `read_rows` and `require_column` raise it;
            `records.table-cell` names line and column.
    """
    if wrong := sorted(set(mapping) - set(FIELDS)):
        raise UserError(
            f"--map {wrong[0][:60]}: this is not a field to map; fields: "
            f"{', '.join(sorted(FIELDS))}",
            code="records.map-field",
        )
    if "depth" not in mapping or not {"loss_avg", "loss_last"} & set(mapping):
        raise UserError(
            "--map: depth and loss_avg or loss_last are needed, such as "
            "depth=layers,loss_avg=val_loss",
            code="records.map-field",
        )
    columns, rows = read_rows(path)
    for column in mapping.values():
        require_column(path, columns, column)
    return [_record(path, line, row, mapping) for line, row in rows]


def _record(path: Path, line: int, row: dict[str, str], mapping: dict[str, str]) -> RunRecord:
    """The record of one line."""
    values: dict[str, Any] = {}
    for field, column in mapping.items():
        if cell := (row[column] or "").strip():
            values[field] = _value(f"{path}: line {line}, column {column}", field, cell)
    if "depth" not in values:
        raise UserError(
            f"{path}: line {line}, column {mapping['depth']}: the depth is missing; correct the "
            "line",
            code="records.table-cell",
        )
    shape = ModelShape.official(values.pop("depth"))
    tokens = values.pop("tokens", 0)
    if 0 < tokens < shape.length and "images" not in values:
        raise UserError(
            f"{path}: line {line}, column {mapping['tokens']}: {tokens} tokens are less than one "
            f"image of {shape.length}; correct the line",
            code="records.table-cell",
        )
    images = values.pop("images", tokens // shape.length)
    losses = {metric: values.pop(metric, math.nan) for metric in METRICS}
    given = {
        "name": f"line {line}",
        "state": "complete",
        "final_lr_fraction": 0.0,
        "data_hash": "",
        "config_hash": "",
        **losses,
        **values,
    }
    measured = any(math.isfinite(value) for value in losses.values())
    return foreign_record(shape, images, (), measured, **given)


def _value(where: str, field: str, cell: str) -> Any:
    """A text, a whole number, or a number. Only a metric may be nan or inf, for a run without a
    result."""
    if field in TEXTS:
        return cell
    kind = "a number from 0 up"
    if field in WHOLE:
        kind = f"a whole number from {WHOLE[field]} to {LARGEST}"
    elif field in METRICS:
        kind = "a positive number" if field.startswith("loss") else "a fraction from 0 to 1"
    try:
        if field in WHOLE:
            if (count := whole(cell)) >= WHOLE[field]:
                return count
        elif _allowed(field, value := number(cell)):
            return value
    except ValueError:
        pass
    raise UserError(
        f"{where}: {field} {shown(cell)} is not {kind}; correct the line",
        code="records.table-cell",
    )


def _allowed(field: str, value: float) -> bool:
    """Whether a number that is not a count can be a value of the field."""
    if field not in METRICS:
        return 0 <= value < math.inf
    if math.isnan(value) or value == math.inf:
        return True
    return value > 0 if field.startswith("loss") else 0 <= value <= 1
