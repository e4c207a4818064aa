"""The run folder is the database of a run.

It holds config.yaml, env.json, metrics.jsonl, status.json, checkpoints/ and log/.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from var_scale.errors import UserError
from var_scale.files import disk_errors, read_json, require_content, write_json

State = Literal["created", "queued", "running", "preempted", "diverged", "failed", "complete"]
EXIT_DIVERGED = 3
EXIT_HUNG = 4
EXIT_REQUEUE = 85  # asks SLURM to requeue the job; on one machine: stopped on request, continues

CAUSES = {
    "stopped": "the run was asked to stop and saved its state",
    "nonfinite": "too many steps had a loss or gradient that was not finite",
    "hung": "no rank made progress for train.hang_seconds",
    "rank-killed": "a signal from outside, or the system, ended a rank",
    "lost-peer": "a rank lost the connection to another rank",
    "out-of-memory": "an allocation failed",
    "exited": "the processes ended without recording a reason",
    "crashed": "an unexpected exception; its stack is in the log",
    "imported": "the run was created from an official checkpoint",
    "retried": "the user released a run that had failed or diverged",
    "setup-failed": "a line of cluster.setup, or the check of the nodes, failed",
    "nodes-differ": "the job got another number of nodes than the run needs",
    "requeues-exhausted": "the job was requeued cluster.requeues times",
    "no-steps": "several attempts in a row made no training step",
}
"""Values of `cause` in status.json, beside the codes of `errors.CODES`: why a run is in its state,
for programs. Empty while nothing went wrong."""


def tokenizer_file(folder: Path) -> Path:
    """The path of a trained tokenizer's weights in its folder."""
    return folder / "tokenizer.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run. Nothing here imports torch."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def env(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "log"

    def status(self) -> dict[str, Any]:
        """status.json, or the state `created` if the run has not started.

        Raises:
            UserError: code `file.not-json`.
        """
        path = self.path / "status.json"
        if path.exists():
            status = read_json(path, "run status")
            if not isinstance(status, dict):
                raise UserError(
                    f"{path}: this is not the status of a run; restore the file",
                    code="file.not-json",
                )
            return status
        return {"state": "created", "reason": "", "cause": "", "restarts": 0}

    def set_status(self, state: State, reason: str = "", *, cause: str = "", **fields: Any) -> None:
        """Replace status.json.

        Args:
            state: the new state.
            reason: a sentence for people.
            cause: one of `CAUSES`, or the code of a `UserError`.
            fields: other entries such as step and total_steps; those not given keep their value.
        """
        new = {"state": state, "reason": reason, "cause": cause, "time": time.time()} | fields
        write_json(self.path / "status.json", self.status() | new)

    def has_steps(self) -> bool:
        """Whether the run has made a step: it has a row of metrics or a checkpoint."""
        return self.metrics.exists() or any(self.checkpoints.glob("step-*"))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one row. If a kill tore the last line, the new row starts on a line of its own."""
        with disk_errors(self.metrics):
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.metrics, "ab+") as file:
                torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")

    def sync_metrics(self) -> None:
        """Force the rows to disk: a checkpoint that is written afterwards relies on them."""
        # A first checkpoint may precede the first row.
        with disk_errors(self.metrics), open(self.metrics, "ab") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All valid rows.

        A row {"kind": "restart", "step": k} makes the rows after step k invalid, and with
        `evaluation_pending` also the evaluation at k. A torn line is ignored: the next attempt
        writes that row again.

        Raises:
            UserError: a line is JSON but not a row, or a value in it has a wrong type (code
                `file.not-metrics`, naming the line).
        """
        rows: list[dict[str, Any]] = []
        if not self.metrics.exists():
            return rows
        require_content(self.metrics)
        for number, line in enumerate(self.metrics.read_text(errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or "kind" not in row:
                raise UserError(
                    f"{self.metrics}: line {number} is not a metrics row; restore the file or "
                    "remove the line",
                    code="file.not-metrics",
                )
            if wrong := _wrong(row):
                raise UserError(
                    f"{self.metrics}: line {number}: {wrong}; restore the file or remove the line",
                    code="file.not-metrics",
                )
            if row["kind"] == "restart":
                rows = [old for old in rows if not _invalidated(old, row)]
            rows.append(row)
        return rows


COUNTS = ("step", "images", "tokens", "flops_exact", "samples")
"""Keys of a row of metrics.jsonl whose values are whole numbers."""
METRIC_KEYS = tuple(f"{what}_{of}" for what in ("loss", "err") for of in ("avg", "last"))
NUMBERS = ("lr", "loss", *METRIC_KEYS, *(f"{key}_sem" for key in METRIC_KEYS))
"""Keys whose values are numbers, or null where JSON has no number for them."""
LISTS = ("loss_per_scale", "err_per_scale", "loss_avg_blocks")


def _wrong(row: dict[str, Any]) -> str:
    """What is wrong with the types of a row; empty for a sound one."""
    if "step" not in row:
        return "the row has no step"
    for key, value in row.items():
        if key in COUNTS and not (_is_number(value) and value >= 0 and float(value).is_integer()):
            kind = "a whole number from 0 up"
        elif key == "seconds" and not _is_number(value):
            kind = "a number"
        elif key in NUMBERS and not (value is None or _is_number(value)):
            kind = "a number or null"
        elif key in LISTS and not (
            isinstance(value, list) and all(item is None or _is_number(item) for item in value)
        ):
            kind = "a list of numbers"
        else:
            continue
        return f"{key} is {json.dumps(value)[:60]}, not {kind}"
    return ""


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold; true and false are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 1024
    return isinstance(value, float)


def _invalidated(row: dict[str, Any], restart: dict[str, Any]) -> bool:
    """Whether a restart makes a row invalid; `evaluation_owed` is the key of older versions."""
    pending = restart.get("evaluation_pending", restart.get("evaluation_owed", False))
    if row["kind"] == "eval" and pending:
        return bool(row["step"] >= restart["step"])
    return bool(row["step"] > restart["step"])
