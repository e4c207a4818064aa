"""`var-scale fit`: a law for any table."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import MISSING, fields
from pathlib import Path

from var_scale.errors import UserError
from var_scale.files import write_json
from var_scale.progress import say
from var_scale.study.api import fit, to_json
from var_scale.study.gate import gate
from var_scale.study.laws import SURFACES, Form, LawFit
from var_scale.study.laws import VARIABLES as LAW_VARIABLES
from var_scale.study.power import NOISE_FLOOR
from var_scale.study.record import METRICS, RunRecord, read_runs_csv, read_table, size_means

VARIABLES = {"params_paper": "N", "params_total": "N", "params_per_token": "N", "flops_exact": "C", "flops_6nd": "C", "flops_paper": "C"}


EXIT_NO_LAW = 1


def study_columns(study: Path, x: list[str], y: str) -> tuple[list[list[float]], list[float], list[str]]:
    """Columns of a study's runs.csv, or of a table that `var-scale records` wrote, of the runs that pass the gate: one point each size, or
    with two variables each run."""
    table = study / "report" / "runs.csv" if study.is_dir() else study
    if not table.exists():
        raise UserError(f"{study}: no report/runs.csv here; give a CSV file, or the folder of a study with a report, such as runs/tiny")
    result = gate(read_runs_csv(table), metrics=(y,) if y in METRICS else METRICS)
    for item in result.excluded:
        say(f"gate: {item.record.name} excluded, {item.code}: {item.text}")
    numbers = [field.name for field in fields(RunRecord) if field.type in ("int", "float")]
    for name in (*x, y):
        if name not in numbers:
            raise UserError(f"{study}: has no column {name} of numbers; columns: {', '.join(numbers)}")
    if len(x) == 1:
        names, ns, values = size_means(result.kept, y, x[0])
        return [ns], values, names
    return [[float(getattr(run, name)) for run in result.kept] for name in x], [run.metric(y) for run in result.kept], [
        run.name for run in result.kept]  # fmt: skip


def read_columns(path: Path, names: list[str], y: str) -> tuple[list[list[float]], list[float], list[str]]:
    """The columns `names`, the column `y` and the line of each row of a CSV. An empty y, nan or inf is a run without a result and comes as
    NaN; anything else that is no number is an error."""
    reader = csv.DictReader(io.StringIO(read_table(path)))
    reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
    if not columns:
        raise UserError(f"{path}: is empty; give a CSV file with a line of column names")
    for name in (*names, y):
        if columns.count(name) != 1:
            if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
                raise UserError(f"{path}: its columns are not separated by commas; write it as a CSV with commas")
            text = "has no column" if name not in columns else "has more than one column"
            raise UserError(f"{path}: {text} {name}; columns: {', '.join(columns)}")
    xs: list[list[float]] = [[] for _ in names]
    ys, lines = [], []
    for line, row in enumerate(reader, 2):
        if None in row:  # type: ignore[comparison-overlap]
            raise UserError(f"{path}: line {line}: has more cells than the header; correct the line")
        for values, name in zip(xs, names, strict=True):
            values.append(_number(path, line, name, row[name]))
            if not 0 < values[-1] < math.inf:
                raise UserError(f"{path}: line {line}: {name}={row[name]!r} is not a positive number; correct the line")
        ys.append(_number(path, line, y, row[y] if (row[y] or "").strip() else "nan"))
        lines.append(f"line {line}")
    return xs, ys, lines


def _records(table: Path) -> bool:
    """Whether a CSV is a table of records."""
    head = read_table(table).partition("\n")[0].split(",")
    return {field.name for field in fields(RunRecord) if field.default is MISSING} <= {name.strip() for name in head}


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise UserError(f"{path}: line {line}: {name}={text!r} is not a number; correct the line") from None


def fit_table(
    table: Path, x: str, y: str, form: Form, floor: float, out: Path | None = None, outliers: bool = True, seed: int = 0
) -> LawFit:
    """Print the law with intervals and what was left out, write it to `out`; a fit that did not converge is an error with code 1."""
    if floor and form not in ("power", "broken_power"):
        raise UserError(f"--floor: the form {form} fits the floor itself; leave --floor out, or use --form power")
    names = [name.strip() for name in x.split(",")]
    if len(names) != len(LAW_VARIABLES[form]):
        such = {1: "one variable", 2: "two variables, such as --x N,D", 3: "three variables, such as --x N,D,U with U different tokens"}
        raise UserError(f"--x {x}: the form {form} has {such[len(LAW_VARIABLES[form])]}")
    if table.is_dir() or _records(table):
        if form in SURFACES:
            names = [short if name == letter else name for name, letter, short in
                     zip(names, "NDU", ("params_paper", "tokens", "unique_tokens"), strict=False)]  # fmt: skip
        columns, ys, lines = study_columns(table, names, y)
    else:
        columns, ys, lines = read_columns(table, names, y)
    data: dict[str, list[float]] = dict(zip(("d", "unique"), columns[1:], strict=False))
    law = fit(columns[0], ys, form, **data, floor=floor, names=lines, metric=y, variable=VARIABLES.get(x, x), outliers=outliers,
              seed=seed, noise_floor=NOISE_FLOOR)  # type: ignore[arg-type]  # fmt: skip
    if out:
        write_json(out, to_json(law))
    for row, code, text in law.excluded:
        say(f"left out: {row}, {code}: {text}")
    if not law.converged:
        error = UserError(f"{table}: no {form} law of {y} against {x}: {law.reason}")
        error.code = EXIT_NO_LAW
        raise error
    show(law, form, floor)
    return law


def show(law: LawFit, form: Form, floor: float) -> None:
    """Equation, intervals, and what to know about them."""
    r = f", r = {law.r:.4f}, descriptive" if math.isfinite(law.r) else ""
    say(f"{law.equation}   ({len(law.x)} points{r}; residual sd {law.residual_sd:.2g} with {law.freedom} degrees of freedom)")
    for name in (*law.params, *(name for name in law.intervals if name not in law.params)):
        if name not in law.intervals:
            continue
        low, high = law.intervals[name]
        end = f"to {high:.6g}" if math.isfinite(high) else "or more: the points do not bound it"
        value = f"{law.params[name]:.6g}" if name in law.params else ""
        say(f"  {name:7} {value}   95 % interval {low:.6g} {end}")
    if law.residual_sd < law.noise_floor:
        say(f"  intervals assume a noise of {law.noise_floor:.2g} a run; the scatter here is smaller")
    if form in SURFACES:
        audit = law.audit
        say(f"  {audit['starts']} starts, {audit['descents']} descents, {audit['agree']} of them to this optimum; split: the exponent of N "
            "in compute-optimal training, N ~ C^split")  # fmt: skip
    if form == "broken_power":
        straight = fit(law.x, law.y, "power", floor=floor, outliers=False)
        if not law.aicc < straight.aicc - 2:
            say("  a power law without a break does as well on these points" if math.isfinite(law.aicc) else
                f"  {len(law.x)} points are too few to tell this from a power law without a break")  # fmt: skip
    if math.isfinite(law.aicc):
        say(f"  AICc {law.aicc:.2f}: of forms fitted to the same rows the smaller is the better one; less than 2 apart says nothing")
    bend, p = law.curvature()
    if p < 0.05:
        hint = "a floor? try --form power_floor" if bend > 0 else "it steepens; try --form broken_power"
        say(f"  the points bend (quadratic term in ln {law.variable}: p = {p:.2g}), so the interval is too narrow: {hint}")
    elif form == "power" and not floor:
        say("  with E = 0: an irreducible part changes the exponent; --form power_floor fits it, --floor assumes one")
