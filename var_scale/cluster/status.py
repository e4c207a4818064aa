"""The state of every run of a study as one table."""

from __future__ import annotations

import os
import shutil
import time

from rich.table import Table

from var_scale.cluster.pipeline import Study, check_runs
from var_scale.cluster.slurm import active_jobs, needs_data
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.progress import duration, print_table, say
from var_scale.run_folder import RunFolder, take_lock


def _alive(run: RunFolder) -> bool:
    """Whether some process holds the lock of the run or of its launcher, on this machine or (with a shared disk's locks) another."""
    for name in (".launcher.lock", ".lock"):
        handle = take_lock(run.path / name)
        if handle is None:
            return True
        os.close(handle)
    return False


def _prepare_lost(study: Study) -> str:
    """A word on a prepare job that ended without the data that the runs wait for."""
    path = study.folder / "slurm" / "jobs.json"
    job = read_json(path, "list of jobs").get("prepare") if path.exists() else None
    if not job or not shutil.which("squeue") or job in active_jobs([job]) or not needs_data(study):
        return ""
    return f"prepare: job {job} ended without the data; {study.folder / 'slurm' / f'prepare-{job}.out'} says why; then run the study again"


def watch(study: Study, seconds: float = 5.0) -> None:
    """The table again and again, until nothing is left to do or Ctrl-C."""
    while True:
        print("\033[2J\033[H", end="")
        states = status_table(study)
        if not states & {"queued", "running", "preempted", "created"}:
            return
        time.sleep(seconds)


def status_table(study: Study) -> set[str]:
    """State, step, loss, speed, remaining time and reason of every run; returns the states."""
    if not study.folder.is_dir():
        raise UserError(f"{study.folder}: no such study here; nothing of it was run yet, or --runs names another folder")
    check_runs(study)
    table = Table(title=f"study {study.config.name} ({study.folder})")
    for column in ("run", "state", "step", "train loss", "images/s", "time", "left", "restarts", "since", "job", "reason"):
        table.add_column(column, justify="left" if column in ("run", "state", "job", "reason") else "right")
    jobs = [run.status().get("job", "") for _, run in study.runs()]
    there, states = active_jobs(jobs) if any(jobs) and shutil.which("squeue") else {}, set()
    for config, run in study.runs():
        status = run.status()
        job = status.get("job", "")
        if job in there and there[job][0] == "PENDING":
            status |= {"state": "queued", "reason": "; ".join(filter(None, (there[job][1], status.get("reason", ""))))}
        elif status["state"] in ("queued", "running") and job not in there and not _alive(run):
            status |= {"state": "interrupted", "reason": "its processes are gone; the next run of the study continues it"}
        if not run.config.exists():
            status["state"] = "not started"
        rows = [row for row in run.read_metrics() if row["kind"] == "train"]
        last = rows[-1] if rows else None
        if job in there and status["state"] == "failed":
            states.add("running")  # its job has the last word, and may bring it back
        if status["state"] == "running" and last:
            status["step"] = max(status.get("step", 0), last["step"])
        left = (status.get("total_steps", 0) - last["step"]) * last["step_seconds"] if last and status["state"] != "complete" else None
        states.add(status["state"])
        since = duration(time.time() - status["time"]) if "time" in status else ""
        table.add_row(
            config.name, status["state"], f"{status.get('step', 0)}/{status.get('total_steps', '?')}",
            f"{last['loss']:.4f}" if last and last["loss"] is not None else "", f"{last['images_per_second']:,.0f}" if last else "",
            duration(last["seconds"]) if last else "", duration(left) if left is not None else "",
            str(status.get("restarts", 0)), since, job, status.get("reason", ""),
        )  # fmt: skip
    print_table(table)
    if lost := _prepare_lost(study):
        say(lost)
    return states
