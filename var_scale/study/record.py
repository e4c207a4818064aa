"""A run folder as one typed row (contract 8), and a table of rows as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.files import read_json, write_text
from var_scale.run_folder import RunFolder

METRICS = ("loss_last", "loss_avg", "err_last", "err_avg")
RUN_KEYS = ("name", "depth", "seed", "shape", "total_steps", "global_batch", "config_hash", "data_hash", "final_lr_fraction")


class CurvePoint(NamedTuple):
    """One evaluation during a run; losses in nats a token, errors as fractions, compute in exact training FLOPs so far."""

    step: int
    flops_exact: float
    loss_last: float
    loss_avg: float
    err_last: float
    err_avg: float


@dataclass(frozen=True)
class RunRecord:
    """One run. Losses: cross-entropy in nats a token on the validation split; errors: fractions; NaN where not measured."""

    name: str
    depth: int
    seed: int
    params_total: int
    params_paper: int
    """N of the paper, 18 d C^2"""
    params_per_token: int
    images: int
    """training images seen, repeats counted"""
    tokens: int
    flops_exact: int
    flops_6nd: int
    flops_paper: int
    """forward MACs, the paper's convention"""
    loss_last: float
    loss_avg: float
    err_last: float
    err_avg: float
    loss_per_scale: tuple[float, ...]
    err_per_scale: tuple[float, ...]
    eval_samples: int
    state: str
    reason: str
    final_lr_fraction: float
    """last learning rate / peak"""
    data_hash: str
    config_hash: str
    seconds: float
    """wall time of the training, all restarts together"""
    restarts: int
    curve: tuple[CurvePoint, ...] = ()
    unique_tokens: int = 0
    """different ones among `tokens` there could be: images of the training set x L; 0 where not known"""
    sems: tuple[float, ...] = ()
    """standard errors of METRICS from the choice of validation images, which all runs share; empty where not measured"""

    @property
    def epochs(self) -> float:
        """Passes over the training set; NaN where its size is not known."""
        return self.tokens / self.unique_tokens if self.unique_tokens else math.nan

    def metric(self, name: str) -> float:
        """One of METRICS."""
        return float(getattr(self, name))

    def size(self, count: str = "params_paper") -> int:
        """N by the given way of counting: params_paper, params_total or params_per_token."""
        return int(getattr(self, count))


def read_run(folder: Path) -> RunRecord:
    """Read a run folder: run.json (written at start), metrics.jsonl, status.json. A run in any state has a record."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise UserError(f"{folder}: no run.json here, so this is not a run that has started; start it or leave it out")
    run = read_json(folder / "run.json", "run description")
    if missing := [key for key in RUN_KEYS if key not in run]:
        raise UserError(f"{folder / 'run.json'}: {missing[0]} is missing; restore the file or train the run again")
    shape = ModelShape.from_dict(run["shape"], str(folder / "run.json"))
    box = RunFolder(folder)
    status, rows = box.status(), box.read_metrics()
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    finals = [row for row in evals if row.get("final")]
    last: dict[str, Any] = finals[-1] if finals else {}
    steps = max((int(row["step"]) for row in train + evals), default=0)
    images = int(last.get("images", max((int(row.get("images", 0)) for row in train + evals), default=0)))
    params, flops = count_params(shape), count_flops(shape)
    values = {name: _number(last.get(name)) for name in METRICS}
    share = int(last["flops_exact"]) / (images * flops.training) if "flops_exact" in last else 1.0  # progressive training saw less
    return RunRecord(
        name=str(run["name"]), depth=int(run["depth"]), seed=int(run["seed"]),
        params_total=params.total, params_paper=params.paper, params_per_token=params.per_token,
        images=images, tokens=int(last.get("tokens", images * flops.tokens)),
        flops_exact=int(last.get("flops_exact", images * flops.training)), flops_6nd=round(share * images * flops.training_6nd),
        flops_paper=round(share * images * flops.paper),
        loss_last=values["loss_last"], loss_avg=values["loss_avg"], err_last=values["err_last"], err_avg=values["err_avg"],
        loss_per_scale=tuple(_number(v) for v in last.get("loss_per_scale", ())),
        err_per_scale=tuple(_number(v) for v in last.get("err_per_scale", ())),
        eval_samples=int(last.get("samples", 0)),
        state=str(status["state"]), reason=str(status.get("reason", "")),
        final_lr_fraction=_lr_fraction(run, train, steps),
        data_hash=str(run["data_hash"]), config_hash=str(run["config_hash"]),
        seconds=max((float(row.get("seconds", 0.0)) for row in train + evals), default=0.0), restarts=int(status.get("restarts", 0)),
        curve=tuple(_point(row, flops.training, folder) for row in evals), unique_tokens=int(run.get("train_samples", 0)) * flops.tokens,
        sems=tuple(_number(last[f"{name}_sem"]) for name in METRICS) if "loss_avg_sem" in last else (),
    )  # fmt: skip


def size_means(records: Sequence[RunRecord], metric: str, count: str = "params_paper") -> tuple[list[str], list[float], list[float]]:
    """Names, N and values, one each size: seeds of a size share what the law misses there, so they are one point of a fit, their
    geometric mean."""
    groups: dict[int, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.size(count), []).append(record)
    names = ["+".join(run.name for run in groups[n]) for n in sorted(groups)]
    logs = [[math.log(v) if (v := run.metric(metric)) > 0 else math.nan for run in groups[n]] for n in sorted(groups)]
    return names, [float(n) for n in sorted(groups)], [math.exp(sum(values) / len(values)) for values in logs]


def seed_noise(records: Sequence[RunRecord], metric: str) -> float:
    """Pooled standard deviation of ln metric between runs of one size; NaN when no size was run twice."""
    square, freedom = 0.0, 0
    for n in {record.params_paper for record in records}:
        logs = [math.log(record.metric(metric)) for record in records if record.params_paper == n]
        mean = sum(logs) / len(logs)
        square += sum((value - mean) ** 2 for value in logs)
        freedom += len(logs) - 1
    return math.sqrt(square / freedom) if freedom else math.nan


def read_study(study_dir: Path) -> list[RunRecord]:
    """All runs of a study folder (its sub-folders with a run.json), smallest first."""
    folders = sorted(path.parent for path in Path(study_dir).glob("*/run.json"))
    if not folders:
        raise UserError(f"{study_dir}: no run has started here (no */run.json); launch the study first")
    return sorted((read_run(folder) for folder in folders), key=lambda run: (run.params_paper, run.seed, run.name))


def write_runs_csv(records: Sequence[RunRecord], path: Path) -> None:
    """One line a run; lists and the curve are JSON inside a cell. `read_runs_csv` gives equal records back."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(RunRecord)]
    writer.writerow(names)
    for record in records:
        cells = [getattr(record, name) for name in names]
        writer.writerow(
            [json.dumps(cell) if isinstance(cell, tuple) else repr(cell) if isinstance(cell, float) else cell for cell in cells]
        )
    write_text(Path(path), out.getvalue())


def read_table(path: Path) -> str:
    """The text of a CSV file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: this table does not exist; give a CSV file or a study folder with a report") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8; give a CSV file") from None


def read_runs_csv(path: Path) -> list[RunRecord]:
    """Records from a table that `write_runs_csv` (or a person) wrote; a bad cell is named by line and column."""
    records, reader = [], csv.DictReader(io.StringIO(read_table(path)))
    for line, row in enumerate(reader, 2):
        values: dict[str, Any] = {}
        for field in fields(RunRecord):
            cell = row.get(field.name)
            if cell is None and field.default is not MISSING and field.name not in (reader.fieldnames or ()):
                continue  # a table of an earlier version
            if cell is None:
                raise UserError(f"{path}: line {line} has no column {field.name}; add it to the table")
            try:
                values[field.name] = _cell(cell, str(field.type))
            except (ValueError, TypeError):
                raise UserError(f"{path}: line {line}, column {field.name}: {cell!r} is not a {field.type}") from None
        records.append(RunRecord(**values))
    return records


def _cell(cell: str, kind: str) -> Any:
    if kind == "int":
        return int(cell)
    if kind == "float":
        return float(cell)
    if kind == "str":
        return cell
    values = json.loads(cell or "[]")
    return tuple(CurvePoint(*value) for value in values) if "CurvePoint" in kind else tuple(float(value) for value in values)


def _number(value: Any) -> float:
    """A float; NaN for null or a missing value (JSON has no NaN of its own)."""
    return math.nan if value is None else float(value)


def _point(row: dict[str, Any], flops_per_image: int, folder: Path) -> CurvePoint:
    try:
        flops = float(row.get("flops_exact", row["images"] * flops_per_image))
        return CurvePoint(int(row["step"]), flops, *(_number(row.get(name)) for name in METRICS))
    except KeyError as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: an evaluation row has no {error.args[0]}; restore the file") from None


def _lr_fraction(run: dict[str, Any], train: list[dict[str, Any]], steps: int) -> float:
    """The schedule's end when the run reached it, else the last logged rate over the peak."""
    peak = float(run.get("peak_lr") or 0)
    if steps >= int(run["total_steps"]):
        return float(run["final_lr_fraction"])
    rates = [float(row["lr"]) for row in train if row.get("lr") is not None]
    return rates[-1] / peak if rates and peak > 0 else math.nan
