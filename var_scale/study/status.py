"""The state of every run of a study as one table."""

from __future__ import annotations

import shutil
import time
from typing import Any

from rich.table import Table

from var_scale.jobs.slurm import active_jobs
from var_scale.locks import lock
from var_scale.progress import duration, print_table, say
from var_scale.run_folder import RunFolder
from var_scale.study.checks import require_folder, require_matching_runs
from var_scale.study.study import Study, run_jobs

COLUMNS = [
    "run",
    "state",
    "step",
    "train loss",
    "images/s",
    "time",
    "left",
    "restarts",
    "since",
    "job",
    "reason",
]
WATCHED = {"queued", "running", "preempted", "created"}
"""States of a run that may still change without the user."""


def watch(study: Study, seconds: float = 5.0) -> None:
    """Print the table every few seconds until nothing is left to do, or until Ctrl-C."""
    while True:
        print("\033[2J\033[H", end="")
        if not status_table(study) & WATCHED:
            return
        time.sleep(seconds)


def status_table(study: Study) -> set[str]:
    """Print state, step, loss, speed, remaining time and reason of every run; returns the states.

    Raises:
        UserError: the study has no folder (code `study.folder-missing`), or it holds other runs.
    """
    require_folder(study)
    require_matching_runs(study)
    table = Table(title=f"study {study.config.name} ({study.folder})")
    for column in COLUMNS:
        words = column in ("run", "state", "job", "reason")
        table.add_column(column, justify="left" if words else "right")
    jobs = run_jobs(run for _, run in study.runs())
    active = active_jobs(jobs) if jobs and shutil.which("squeue") else {}
    states = set()
    for config, run in study.runs():
        status = _current(run, active)
        # The job of a failed run decides what happens next, and may start it again.
        waits = status["state"] == "failed" and status.get("job") in active
        states |= {status["state"], "running"} if waits else {status["state"]}
        table.add_row(config.name, *_cells(run, status))
    print_table(table)
    if message := _prepare_failed(study):
        say(message)
    return states


def _current(run: RunFolder, active: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """status.json of a run, corrected by what SLURM and the run's locks show."""
    status = run.status()
    job = status.get("job", "")
    if job in active and active[job][0] == "PENDING":
        # A requeued job writes its status only when it starts again.
        reasons = filter(None, (active[job][1], status.get("reason", "")))
        status |= {"state": "queued", "reason": "; ".join(reasons)}
    elif status["state"] in ("queued", "running") and job not in active and not _alive(run):
        status |= {
            "state": "interrupted",
            "reason": "its processes have ended; run the study again to continue it",
        }
    if not run.config.exists():
        status["state"] = "not started"
    return status


def _alive(run: RunFolder) -> bool:
    """Whether a process holds the lock of the run or of its launcher.

    Where the file system shares its locks, processes of other machines count too.
    """
    for name in (".launcher.lock", ".lock"):
        with lock(run.path / name) as free:
            if not free:
                return True
    return False


def _cells(run: RunFolder, status: dict[str, Any]) -> list[str]:
    """The columns of a run after its name."""
    rows = [row for row in run.read_metrics() if row["kind"] == "train"]
    step, total = status.get("step", 0), status.get("total_steps")
    loss = speed = spent = left = ""
    if rows:
        last = rows[-1]
        loss = f"{last['loss']:.4f}" if last["loss"] is not None else ""
        speed, spent = f"{last['images_per_second']:,.0f}", duration(last["seconds"])
        if status["state"] == "running":
            step = max(step, last["step"])
        if status["state"] != "complete":
            left = duration(((total or 0) - last["step"]) * last["step_seconds"])
    return [
        status["state"],
        f"{step}/{total or '?'}",
        loss,
        speed,
        spent,
        left,
        str(status.get("restarts", 0)),
        duration(time.time() - status["time"]) if "time" in status else "",
        status.get("job", ""),
        status.get("reason", ""),
    ]


def _prepare_failed(study: Study) -> str:
    """A message about a `prepare` job that ended without the data that the runs wait for."""
    job = study.submitted_jobs().get("prepare")
    if not job or not shutil.which("squeue") or not study.needs_data() or active_jobs([job]):
        return ""
    log = study.folder / "slurm" / f"prepare-{job}.out"
    return (
        f"prepare: job {job} ended without the data; {log} has the error; then run the study again"
    )
