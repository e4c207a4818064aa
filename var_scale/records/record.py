"""A run as one typed row, and how a run folder becomes one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from var_scale.config.load import read_tree
from var_scale.cost.flops import count_flops
from var_scale.cost.params import count_params
from var_scale.cost.shape import ModelShape
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.records.cells import shown
from var_scale.run_folder import RunFolder

METRICS = ("loss_last", "loss_avg", "err_last", "err_avg")
RUN_KEYS = (
    "name",
    "depth",
    "seed",
    "shape",
    "total_steps",
    "global_batch",
    "config_hash",
    "data_hash",
    "final_lr_fraction",
)
COUNTS = ("depth", "seed", "total_steps", "global_batch", "train_samples")
"""Keys of run.json whose values are whole numbers."""


class CurvePoint(NamedTuple):
    """One evaluation during a run: losses in nats per token, errors as fractions, and exact
    training FLOPs so far."""

    step: int
    flops_exact: float
    loss_last: float
    loss_avg: float
    err_last: float
    err_avg: float


@dataclass(frozen=True)
class RunRecord:
    """One run. Losses are cross-entropy in nats per token on the validation split (see `split`) and
    errors are fractions; both are NaN where not measured."""

    name: str
    depth: int
    seed: int
    params_total: int
    params_paper: int
    """N of the paper, 18 d C^2."""
    params_per_token: int
    images: int
    """Training images seen, repeats counted."""
    tokens: int
    flops_exact: int
    flops_6nd: int
    flops_paper: int
    """Forward MACs, the paper's convention."""
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
    """Last learning rate / peak."""
    data_hash: str
    config_hash: str
    seconds: float
    """Wall time of the training, all restarts together."""
    restarts: int
    curve: tuple[CurvePoint, ...] = ()
    unique_tokens: int = 0
    """Different tokens that `tokens` can contain: images of the training set x L; 0 if unknown."""
    sems: tuple[float, ...] = ()
    """Standard errors of METRICS due to the choice of validation images, which all runs share;
    empty where not measured."""
    peak_lr: float = 0.0
    """Largest learning rate of the run; 0 if unknown."""
    blocks: tuple[float, ...] = ()
    """Average loss of parts of the validation images, the same parts in every run; empty where not
    measured."""
    split: str = "validation"
    """Data of METRICS: validation, or training where a log has no other numbers. Those are running
    means of the last epoch, so they are not comparable with validation."""
    counted: str = "params_paper"
    """The field that the laws take as N: params_paper, or params_total with study.count=total."""

    @property
    def n(self) -> int:
        """N of the laws."""
        return int(getattr(self, self.counted))

    @property
    def epochs(self) -> float:
        """Passes over the training set; NaN where its size is unknown."""
        return self.tokens / self.unique_tokens if self.unique_tokens else math.nan

    def metric(self, name: str) -> float:
        """One of METRICS."""
        return float(getattr(self, name))


def record_of(shape: ModelShape, images: int, **values: Any) -> RunRecord:
    """A record with the parameters of a model and the compute of `images` training images.

    Args:
        values: the other fields, and counts that are known better.
    """
    params, flops = count_params(shape), count_flops(shape)
    counts: dict[str, Any] = {
        "depth": shape.depth,
        "params_total": params.total,
        "params_paper": params.paper,
        "params_per_token": params.per_token,
        "images": images,
        "tokens": images * flops.tokens,
        "flops_exact": images * flops.training,
        "flops_6nd": images * flops.training_6nd,
        "flops_paper": images * flops.paper,
    }
    return RunRecord(**(counts | values))


def read_run(folder: Path, counted: str = "") -> RunRecord:
    """Read a run folder: run.json (written at the start), metrics.jsonl and status.json.

    A run in any state has a record.

    Args:
        counted: the field that is N; "" asks the study that the folder belongs to.

    Raises:
        UserError: code `records.run-missing` or `records.run-incomplete`.
    """
    folder = Path(folder)
    description = folder / "run.json"
    if not description.exists():
        raise UserError(
            f"{folder}: there is no run.json, so this is not a run that has started; start it or "
            "leave it out",
            code="records.run-missing",
        )
    run = read_json(description, "run description")
    if not isinstance(run, dict) or not isinstance(run.get("shape", {}), dict):
        raise UserError(
            f"{description}: this is not the description of a run; restore the file or train the "
            "run again",
            code="records.run-incomplete",
        )
    if missing := [key for key in RUN_KEYS if key not in run]:
        raise UserError(
            f"{description}: the key {missing[0]} is missing; restore the file or train the run "
            "again",
            code="records.run-incomplete",
        )
    _require_types(run, description, COUNTS, ("final_lr_fraction", "peak_lr"))
    shape = ModelShape.from_dict(run["shape"], str(description))
    run_folder = RunFolder(folder)
    status, rows = run_folder.status(), run_folder.read_metrics()
    if "state" not in status:
        raise UserError(
            f"{folder / 'status.json'}: the key state is missing; restore the file",
            code="records.run-incomplete",
        )
    _require_types(status, folder / "status.json", ("restarts",))
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    finals = [row for row in evals if row.get("final")]
    last: dict[str, Any] = finals[-1] if finals else {}
    steps = max((int(row["step"]) for row in train + evals), default=0)
    seen = max((int(row.get("images", 0)) for row in train + evals), default=0)
    images = int(last.get("images", seen))
    flops = count_flops(shape)
    counts = {"tokens": int(last.get("tokens", images * flops.tokens))}
    if "flops_exact" in last and images:
        # In progressive training early images have fewer tokens, so an image costs less.
        share = int(last["flops_exact"]) / (images * flops.training)
        counts |= {
            "flops_exact": int(last["flops_exact"]),
            "flops_6nd": round(share * images * flops.training_6nd),
            "flops_paper": round(share * images * flops.paper),
        }
    sems = (
        tuple(_number(last.get(f"{name}_sem")) for name in METRICS)
        if "loss_avg_sem" in last
        else ()
    )
    return record_of(
        shape,
        images,
        **counts,
        **{name: _number(last.get(name)) for name in METRICS},
        name=str(run["name"]),
        depth=int(run["depth"]),
        seed=int(run["seed"]),
        loss_per_scale=tuple(_number(value) for value in last.get("loss_per_scale", ())),
        err_per_scale=tuple(_number(value) for value in last.get("err_per_scale", ())),
        eval_samples=int(last.get("samples", 0)),
        state=str(status["state"]),
        reason=str(status.get("reason", "")),
        final_lr_fraction=_lr_fraction(run, train, steps),
        data_hash=str(run["data_hash"]),
        config_hash=str(run["config_hash"]),
        seconds=max((float(row.get("seconds", 0.0)) for row in train + evals), default=0.0),
        restarts=int(status.get("restarts", 0)),
        curve=tuple(_point(row, flops.training, folder) for row in evals),
        unique_tokens=int(run.get("train_samples", 0)) * flops.tokens,
        sems=sems,
        peak_lr=float(run.get("peak_lr") or 0),
        blocks=tuple(_number(value) for value in last.get("loss_avg_blocks", ())),
        counted=counted or _counted(folder.parent / "study.yaml"),
    )


def _counted(study: Path) -> str:
    """The field that a study takes as N; that of the paper for a run without a study."""
    count = (read_tree(study).get("study") or {}).get("count") if study.exists() else None
    return "params_total" if count == "total" else "params_paper"


def read_study(study_dir: Path) -> list[RunRecord]:
    """All runs of a study folder (its sub-folders with a run.json), smallest first.

    Raises:
        UserError: code `records.study-empty`, or as `read_run` does.
    """
    folders = sorted(path.parent for path in Path(study_dir).glob("*/run.json"))
    if not folders:
        raise UserError(
            f"{study_dir}: no run has started (there is no */run.json); launch the study first",
            code="records.study-empty",
        )
    counted = _counted(Path(study_dir) / "study.yaml")
    return by_size(read_run(folder, counted) for folder in folders)


def by_size(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Runs in the order of tables and fits: by N, seed and name."""
    return sorted(records, key=lambda run: (run.params_paper, run.seed, run.name))


def _require_types(
    values: dict[str, Any], path: Path, counts: tuple[str, ...], numbers: tuple[str, ...] = ()
) -> None:
    """Refuse a file of a run in which a value has a wrong type.

    Raises:
        UserError: code `records.run-incomplete`.
    """
    for key in (*counts, *numbers):
        value = values.get(key, 0)
        if key == "peak_lr" and value is None:
            continue  # unknown
        if not isinstance(value, int if key in counts else int | float) or isinstance(value, bool):
            kind = "a whole number" if key in counts else "a number"
            raise UserError(
                f"{path}: {key} is {shown(value)}, not {kind}; restore the file",
                code="records.run-incomplete",
            )


def _number(value: Any) -> float:
    """A float; NaN for null or a missing value, because JSON has no NaN."""
    return math.nan if value is None else float(value)


def _point(row: dict[str, Any], flops_per_image: int, folder: Path) -> CurvePoint:
    try:
        flops = float(row.get("flops_exact", row["images"] * flops_per_image))
        return CurvePoint(int(row["step"]), flops, *(_number(row.get(name)) for name in METRICS))
    except KeyError as error:
        raise UserError(
            f"{folder / 'metrics.jsonl'}: an evaluation row has no {error.args[0]}; restore the "
            "file",
            code="records.run-incomplete",
        ) from None


def _lr_fraction(run: dict[str, Any], train: list[dict[str, Any]], steps: int) -> float:
    """The end of the schedule if the run reached it, otherwise the last logged rate / peak."""
    peak = float(run.get("peak_lr") or 0)
    if steps >= int(run["total_steps"]):
        return float(run["final_lr_fraction"])
    rates = [float(row["lr"]) for row in train if row.get("lr") is not None]
    return rates[-1] / peak if rates and peak > 0 else math.nan
