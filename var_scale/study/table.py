"""`var-scale fit`: a law for any table."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields
from pathlib import Path

from var_scale.errors import UserError
from var_scale.progress import say
from var_scale.study.fit import fit_law
from var_scale.study.gate import gate
from var_scale.study.laws import Form
from var_scale.study.record import RunRecord, read_runs_csv, read_table, size_means

VARIABLES = {"params_paper": "N", "params_total": "N", "params_per_token": "N", "flops_exact": "C", "flops_6nd": "C", "flops_paper": "C"}


def study_columns(study: Path, x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of a study's runs.csv, of the runs that pass the gate, one point each size."""
    table = study / "report" / "runs.csv"
    if not table.exists():
        raise UserError(f"{study}: no report/runs.csv here; give a CSV file, or the folder of a study with a report, such as runs/tiny")
    result = gate(read_runs_csv(table))
    for item in result.excluded:
        say(f"gate: {item.record.name} excluded, {item.code}: {item.text}")
    numbers = [field.name for field in fields(RunRecord) if field.type in ("int", "float")]
    for name in (x, y):
        if name not in numbers:
            raise UserError(f"{study}: has no column {name} of numbers; columns: {', '.join(numbers)}")
    return size_means(result.kept, y, x)[1:]


def read_columns(path: Path, x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of a CSV."""
    reader = csv.DictReader(io.StringIO(read_table(path)))
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or []]
    for name in (x, y):
        if names.count(name) != 1:
            text = "has no column" if name not in names else "has more than one column"
            raise UserError(f"{path}: {text} {name}; columns: {', '.join(names)}")
    xs, ys = [], []
    for line, row in enumerate(reader, 2):
        try:
            pair = float(row[x]), float(row[y])
        except (TypeError, ValueError):
            pair = math.nan, math.nan
        if None in row or not all(0 < value < math.inf for value in pair):  # type: ignore[comparison-overlap]
            what = "has more cells than the header" if None in row else f"{x}={row[x]!r}, {y}={row[y]!r} are not both positive numbers"  # type: ignore[comparison-overlap]
            raise UserError(f"{path}: line {line}: {what}; correct the line")
        xs.append(pair[0])
        ys.append(pair[1])
    return xs, ys


def fit_table(table: Path, x: str, y: str, form: Form, floor: float) -> None:
    """Print the law with intervals; a fit that did not converge is an error."""
    if floor and form == "power_floor":
        raise UserError("--floor: the form power_floor fits the floor itself; leave --floor out, or use --form power")
    xs, ys = (study_columns if table.is_dir() else read_columns)(table, x, y)
    fit = fit_law(form, xs, ys, metric=y, floor=floor, variable=VARIABLES.get(x, x))
    if not fit.converged:
        raise UserError(f"{table}: no {form} law of {y} against {x}: {fit.reason}")
    say(f"{fit.equation}   ({len(xs)} points, r = {fit.r:.4f}, descriptive; residual sd {fit.residual_sd:.2g} with {fit.freedom} degrees "
        "of freedom)")  # fmt: skip
    for name, (low, high) in fit.intervals.items():
        end = f"to {high:.6g}" if math.isfinite(high) else "or more: the points do not bound it"
        say(f"  {name:6} {fit.params[name]:.6g}   95 % interval {low:.6g} {end}")
    if fit.residual_sd < fit.noise_floor:
        say(f"  intervals assume a noise of {fit.noise_floor:.2g} a run; the scatter here is smaller")
    bend, p = fit.curvature()
    if p < 0.05:
        hint = "a floor? try --form power_floor" if bend > 0 else "no power law over this range"
        say(f"  the points bend (quadratic term in ln {x}: p = {p:.2g}), so the interval is too narrow: {hint}")
    elif form == "power" and not floor:
        say("  with E = 0: an irreducible part changes the exponent; --form power_floor fits it, --floor assumes one")
