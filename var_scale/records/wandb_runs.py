"""Runs that var-scale recorded on wandb's server as records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from var_scale.config.load import check, config_hash
from var_scale.cost.flops import count_flops
from var_scale.cost.from_config import shape_of
from var_scale.errors import UserError
from var_scale.records.foreign import foreign_record
from var_scale.records.record import METRICS, CurvePoint, RunRecord

SECTIONS = ("name", "data", "tokenizer", "model", "train", "engine", "log")
"""Keys of a run's config that wandb's config of the run contains among others."""


def read_wandb_project(name: str) -> list[RunRecord]:
    """The runs of ENTITY/PROJECT, or of one GROUP (a study) in it, as this machine's account sees
    them.

    Raises:
        UserError: code `records.wandb-name`, `records.wandb-server` when wandb refuses or is
            unreachable, `records.wandb-foreign` for a run of another program, or
            `records.wandb-configs`.
    """
    import wandb

    parts = name.split("/")
    if len(parts) not in (2, 3):
        raise UserError(
            f"wandb:{name}: give wandb:ENTITY/PROJECT, or wandb:ENTITY/PROJECT/STUDY",
            code="records.wandb-name",
        )
    filters = {"group": parts[2]} if len(parts) == 3 else None
    try:
        attempts = [
            _record(f"{name}/{run.id}", run.name, dict(run.config), list(run.scan_history()))
            for run in wandb.Api().runs("/".join(parts[:2]), filters=filters)
            if run.job_type != "summary"  # the study's own summary beside its runs
        ]
    except UserError:
        raise
    except Exception as error:  # wandb raises many kinds: no login, no such project, no connection
        raise UserError(
            f"wandb:{name}: {str(error).splitlines()[0]}", code="records.wandb-server"
        ) from None
    return merge_attempts(attempts)


def _record(where: str, name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> RunRecord:
    """A record from config and history rows (eval/loss_avg, train/lr, ...)."""
    try:
        tree = {key: value for key, value in config.items() if key in SECTIONS}
        settings = check(tree, where)
    except UserError as error:
        raise UserError(
            f"{where}: var-scale did not record this run ({error})", code="records.wandb-foreign"
        ) from None
    shape = shape_of(settings)
    flops = count_flops(shape)
    evaluations = [row for row in rows if "eval/loss_avg" in row]
    last = evaluations[-1] if evaluations else {}
    curve = [
        CurvePoint(
            int(row["_step"]),
            float(row.get("eval/flops_exact") or row["eval/images"] * flops.training),
            *(
                math.nan if (value := row.get(f"eval/{metric}")) is None else float(value)
                for metric in METRICS
            ),
        )
        for row in evaluations
    ]
    rates = [float(row["train/lr"]) for row in rows if row.get("train/lr")]
    seen = max((int(row.get("train/images") or 0) for row in rows), default=0)
    final = bool(last.get("eval/final"))
    return foreign_record(
        shape,
        int(last.get("eval/images", seen)),
        curve,
        final,
        name=name or settings.name,
        seed=settings.train.seed,
        state="complete" if final else "running",
        reason="" if final else "no final evaluation was recorded",
        final_lr_fraction=rates[-1] / max(rates) if rates else math.nan,
        config_hash=config_hash(settings),
        data_hash="",
        restarts=sum("restart/step" in row for row in rows),
        eval_samples=int(last.get("eval/samples") or 0),
        seconds=float(max((row.get("eval/seconds") or 0 for row in evaluations), default=0.0)),
        unique_tokens=settings.train_samples * flops.tokens,
    )


def merge_attempts(records: Sequence[RunRecord]) -> list[RunRecord]:
    """One record per run: the attempt that came furthest, with the evaluations of all attempts.

    Raises:
        UserError: code `records.wandb-configs` for attempts of one name with different configs.
    """
    runs: dict[str, list[RunRecord]] = {}
    for record in records:
        runs.setdefault(record.name, []).append(record)
    merged = []
    for name, attempts in runs.items():
        if len({attempt.config_hash for attempt in attempts}) > 1:
            raise UserError(
                f"run {name}: its attempts have different configs; give those of one run",
                code="records.wandb-configs",
            )
        attempts.sort(key=lambda attempt: attempt.images)
        best = max(attempts, key=lambda attempt: (attempt.state == "complete", attempt.images))
        # A later attempt repeats steps after its checkpoint; its evaluations replace the earlier.
        points = {point.step: point for attempt in attempts for point in attempt.curve}
        curve = tuple(points[step] for step in sorted(points))
        merged.append(replace(best, curve=curve, restarts=len(attempts) - 1))
    return merged
