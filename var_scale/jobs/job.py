"""What a job's script records in a run folder and asks of it.

launch/job.sh calls `python -m var_scale.jobs.job begin RUN JOB`, `end RUN CODE LOG` and
`fail RUN CAUSE REASON`. Nothing here imports torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from var_scale.errors import UserError
from var_scale.jobs.local import killed_rank, wait_for_ranks
from var_scale.run_folder import RunFolder

HOLD = "HOLD"
"""With this file in its folder a run stays stopped (by `study stop`): its job ends."""
IDLE_ATTEMPTS = 3
"""A run fails after this many attempts in a row without a training step."""
LOST = ("rank-killed", "lost-peer")
"""Causes that lie outside of the run: another attempt may succeed."""


def begin(run: RunFolder, job: str) -> None:
    """Record that an attempt begins, and from which step."""
    step = run.status().get("step", 0)
    run.set_status("queued", job=job, attempt_began=time.time(), attempt_step=step)


def end(run: RunFolder, code: int, log: Path) -> str:
    """Decide what the job does after an attempt.

    Args:
        code: exit code of the launcher.
        log: output of the launcher.

    Returns:
        A verdict and, after a colon, its reason: `complete`, `again`, `held` (by `study stop`),
        `diverged` or `failed`.
    """
    wait_for_ranks(run.path)
    status = run.status()
    state, reason, step = status["state"], status["reason"], status.get("step", 0)
    # The keys in second place are those of runs that began under an earlier version.
    began = status.get("attempt_began", status.get("life_began", time.time()))
    start = status.get("attempt_step", status.get("life_step", 0))
    idle = status.get("idle_attempts", status.get("idle_lives", 0))
    wall = status.get("job_seconds", 0.0) + time.time() - began
    cause = status.get("cause", "")
    if state in ("complete", "diverged"):
        run.set_status(state, reason, cause=cause, job_seconds=wall)
        return state if state == "complete" else f"{state}: {reason}"
    if killed := killed_rank(log):
        reason, cause = killed, "rank-killed"
    elif state in ("queued", "running"):  # the processes ended before they could write a reason
        reason = f"the processes exited without an error message (exit code {code})"
        cause = "exited"
    if state == "failed" and cause not in LOST:
        run.set_status("failed", reason, cause=cause, job_seconds=wall)
        return f"failed: {reason}"
    if (run.path / HOLD).exists():
        reason = "stopped by `study stop`"
        run.set_status("preempted", reason, cause="stopped", job_seconds=wall, idle_attempts=0)
        return f"held: {reason}"
    idle = 0 if step > start else idle + 1
    if idle >= IDLE_ATTEMPTS:
        reason = f"{idle} attempts in a row made no training step; the last: {reason}"
        return fail(run, "no-steps", reason)
    run.set_status("preempted", reason, cause=cause, job_seconds=wall, idle_attempts=idle)
    return f"again: {reason}"


def fail(run: RunFolder, cause: str, reason: str) -> str:
    """Record that the run has failed: `cause` for programs, `reason` for people."""
    run.set_status("failed", reason, cause=cause)
    return f"failed: {reason}"


def main() -> None:
    """The command of a job's script."""
    what, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    try:
        if what == "begin":
            begin(run, sys.argv[3])
        elif what == "end":
            print(end(run, int(sys.argv[3]), Path(sys.argv[4])))
        else:
            print(fail(run, sys.argv[3], sys.argv[4]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
