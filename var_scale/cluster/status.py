"""The state of every run of a study as one table."""

from __future__ import annotations

import os
import time

from rich.table import Table

from var_scale.cluster.pipeline import Study, check_runs
from var_scale.errors import UserError
from var_scale.progress import duration, print_table
from var_scale.run_folder import RunFolder, take_lock


def _alive(run: RunFolder) -> bool:
    """Whether some process holds the lock of the run or of its launcher, on this machine or (with a shared disk's locks) another."""
    for name in (".launcher.lock", ".lock"):
        handle = take_lock(run.path / name)
        if handle is None:
            return True
        os.close(handle)
    return False


def status_table(study: Study) -> None:
    """State, step, loss, speed, time and reason of every run."""
    if not study.folder.is_dir():
        raise UserError(f"{study.folder}: no such study here; nothing of it was run yet, or --runs names another folder")
    check_runs(study)
    table = Table(title=f"study {study.config.name} ({study.folder})")
    for column in ("run", "state", "step", "train loss", "images/s", "time", "restarts", "since", "reason"):
        table.add_column(column, justify="left" if column in ("run", "state", "reason") else "right")
    for config, run in study.runs():
        status = run.status()
        if status["state"] in ("queued", "running") and not _alive(run):
            status |= {"state": "interrupted", "reason": "its processes are gone; the next run of the study continues it"}
        if not run.config.exists():
            status["state"] = "not started"
        rows = [row for row in run.read_metrics() if row["kind"] == "train"]
        last = rows[-1] if rows else None
        since = duration(time.time() - status["time"]) if "time" in status else ""
        table.add_row(
            config.name, status["state"], f"{status.get('step', 0)}/{status.get('total_steps', '?')}",
            f"{last['loss']:.4f}" if last and last["loss"] is not None else "", f"{last['images_per_second']:,.0f}" if last else "",
            duration(last["seconds"]) if last else "", str(status.get("restarts", 0)), since, status.get("reason", ""),
        )  # fmt: skip
    print_table(table)
