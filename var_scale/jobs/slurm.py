"""SLURM's commands: which jobs it still has, and submitting a script."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from var_scale.errors import UserError
from var_scale.files import write_text

ACTIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
}
"""States of a job that has not ended."""


def command(*argv: str) -> str:
    """Run one of SLURM's commands and return its output.

    Raises:
        UserError: the command does not exist here (code `jobs.slurm-missing`), or fails (code
            `jobs.slurm-failed`, with the command's own message).
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{argv[0]}: this command does not exist here; run this where SLURM is installed, or "
            "try launch/dev-cluster",
            code="jobs.slurm-missing",
        ) from None
    if done.returncode:
        message = " ".join(
            line.removeprefix(f"{argv[0]}: ").removeprefix("error: ")
            for line in (done.stderr or done.stdout).splitlines()
        )
        raise UserError(f"{argv[0]}: {message.strip() or 'failed'}", code="jobs.slurm-failed")
    return done.stdout


def active_jobs(ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """State and reason of those jobs and array tasks that have not ended, by number such as 12_3.

    For the number of an array all of its tasks are found.
    """
    wanted = {job.partition("_")[0] for job in ids if job}
    if not wanted:
        return {}
    found = {}
    for line in command("squeue", "--me", "-h", "-r", "-o", "%i|%T|%r").splitlines():
        job, state, reason = line.split("|", 2)
        if job.partition("_")[0] in wanted and state in ACTIVE:
            found[job] = (state, reason)
    return found


def sbatch(path: Path, script: str, *options: str) -> str:
    """Write a script to `path` and submit it; returns the job's number."""
    write_text(path, script)
    try:
        return command("sbatch", "--parsable", *options, str(path)).strip().partition(";")[0]
    except UserError as error:
        raise UserError(
            f"{path}: {error}; change the keys of `cluster` for these runs (docs/how-to/slurm.md)",
            code=error.code,
        ) from None
