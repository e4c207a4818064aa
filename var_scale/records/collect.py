"""Runs from many kinds of sources in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from var_scale.records.gate import gate
from var_scale.records.record import METRICS, RunRecord
from var_scale.records.runs_csv import write_runs_csv
from var_scale.records.sources import read_all

ASSUMED = {
    "images": "no images or tokens, so no compute",
    "final_lr_fraction": "learning rates annealed",
    "data_hash": "all on the same data",
    "seed": "seed 0",
    "seconds": "no times",
}
"""What is assumed of the runs in a mapped table, by the field that it does not map."""


def collect(
    sources: Sequence[str],
    out: Path,
    columns: dict[str, str] | None,
    train_samples: int,
    train_values: bool = False,
) -> list[str]:
    """Write the runs of all sources to the table `out`; returns lines that describe them.

    Args:
        columns: for CSV files of others, the column of each field.
        train_samples: number of training images of official runs.
        train_values: whether to take training numbers where a source has no others.
    """
    lines: list[str] = []
    runs = read_all(sources, columns, train_samples, train_values, lines.append)
    write_runs_csv(runs, out)
    lines += _described(runs)
    if columns:
        assumed = [
            text
            for field, text in ASSUMED.items()
            if field not in columns and not (field == "images" and "tokens" in columns)
        ]
        lines.append(
            "assumed of mapped tables: parameters of the paper's ladder (C = 64 d); "
            + "; ".join(assumed)
        )
    lines.append(
        f"{out}: {len(runs)} runs; `var-scale fit {out} --y loss_avg` fits those that pass the gate"
    )
    return lines


def _described(runs: Sequence[RunRecord]) -> Iterator[str]:
    """One line per run, with the reason where the gate excludes it."""
    measured = [name for name in METRICS if any(math.isfinite(run.metric(name)) for run in runs)]
    excluded = {id(item.record): item for item in gate(runs, metrics=measured or METRICS).excluded}
    for run in runs:
        item = excluded.get(id(run))
        yield (
            f"{run.name}: d{run.depth}, {run.images:,} images, loss_avg {run.loss_avg:.4f}, "
            f"loss_last {run.loss_last:.4f}"
            + ("" if run.split == "validation" else ", values of the training data")
            + (f"  [{item.code}: {item.text}]" if item else "")
        )
