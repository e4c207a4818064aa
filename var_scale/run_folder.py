"""The run folder is the database: config.yaml, env.json, metrics.jsonl, status.json, checkpoints/, log/ (contract 7)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from var_scale.errors import UserError
from var_scale.files import disk_errors, read_json, write_json

State = Literal["created", "queued", "running", "preempted", "diverged", "failed", "complete"]
EXIT_DIVERGED = 3  # the loss or gradient was not finite too often
EXIT_HUNG = 4  # no progress for train.hang_seconds
EXIT_REQUEUE = 85  # asks SLURM for a requeue; the same code means "stopped on request, will continue" on one machine


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
        """status.json, or {"state": "created"} when the run has not begun."""
        path = self.path / "status.json"
        return read_json(path, "run status") if path.exists() else {"state": "created", "reason": "", "restarts": 0}

    def set_status(self, state: State, reason: str = "", **fields: Any) -> None:
        """Replace status.json; `fields` such as step and total_steps are kept from before unless given."""
        status = self.status() | {"state": state, "reason": reason, "time": time.time()} | fields
        write_json(self.path / "status.json", status)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one row; rows are only ever added. A line torn by a kill is closed first."""
        with disk_errors(self.metrics):
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.metrics, "ab+") as file:
                torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")

    def sync_metrics(self) -> None:
        """Put the rows on disk: a checkpoint that comes after them relies on them."""
        with open(self.metrics, "ab") as file:  # a first checkpoint may come before the first row
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows in force: a row {"kind": "restart", "step": k} takes back the rows after step k, and with `evaluation_owed` the
        evaluation at k. A torn last line is ignored."""
        rows: list[dict[str, Any]] = []
        if not self.metrics.exists():
            return rows
        lines = self.metrics.read_text().split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a write cut by a kill; the row is written again after the restart
            if not isinstance(row, dict) or "kind" not in row:
                raise UserError(f"{self.metrics}: line {number} is not a metrics row; restore the file or remove the line")
            if row["kind"] == "restart":
                rows = [old for old in rows if old["step"] < row["step"] + (old["kind"] != "eval" or not row.get("evaluation_owed"))]
            rows.append(row)
        return rows


def take_lock(path: Path, wait_seconds: float = 0.0) -> int | None:
    """Take an exclusive lock on `path`, held until this process ends. None when another process holds it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"warning: {path}: this file system has no locks; make sure that nothing else trains this run", flush=True)
            return handle
