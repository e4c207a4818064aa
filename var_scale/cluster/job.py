"""What a job's script asks of a run folder: `python -m var_scale.cluster.job begin|end|fail RUN ...` (launch/job.sh). No torch here."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from var_scale.cluster.local import LOST_PEER, killed_rank, wait_for_ranks
from var_scale.errors import UserError
from var_scale.run_folder import RunFolder

HOLD = "HOLD"  # in a run's folder: it was stopped by `study stop`, jobs do not bring it back
IDLE_LIVES = 3  # lives without a step, after which a run fails


def begin(run: RunFolder, job: str) -> None:
    """A life begins; what the run's status says afterwards was said by this life."""
    status = run.status()
    run.set_status("queued", job=job, life_began=time.time(), life_step=status.get("step", 0))


def end(run: RunFolder, code: int, log: Path) -> str:
    """A life has ended with the launcher's exit code: what the job does now, as a word and a reason. `complete`, `again`, `held` (stopped
    by a person), `diverged` or `failed`."""
    wait_for_ranks(run.path)
    status = run.status()
    state, reason, killed = status["state"], status["reason"], killed_rank(log)
    wall = status.get("job_seconds", 0.0) + time.time() - status.get("life_began", time.time())
    if state in ("complete", "diverged"):
        run.set_status(state, reason, job_seconds=wall)
        return state if state == "complete" else f"{state}: {reason}"
    lost = killed or (reason if LOST_PEER in reason else "")
    if state in ("queued", "running"):  # the processes are gone and could not say why
        lost = lost or f"the processes ended without a word (exit code {code})"
    if state != "preempted" and not lost:
        run.set_status("failed", reason, job_seconds=wall)
        return f"failed: {reason}"
    idle = 0 if status.get("step", 0) > status.get("life_step", 0) else status.get("idle_lives", 0) + 1
    if (run.path / HOLD).exists():
        run.set_status("preempted", "stopped by `study stop`", job_seconds=wall, idle_lives=0)
        return "held: stopped by `study stop`"
    if idle >= IDLE_LIVES:
        return fail(run, f"{idle} lives of the job without a step, the last: {lost or reason}")
    run.set_status("preempted", lost or reason, job_seconds=wall, idle_lives=idle)
    return f"again: {lost or reason}"


def fail(run: RunFolder, reason: str) -> str:
    """The run has failed for this reason."""
    run.set_status("failed", reason)
    return f"failed: {reason}"


def main() -> None:
    """Of a job's script."""
    what, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    try:
        if what == "begin":
            begin(run, sys.argv[3])
        elif what == "end":
            print(end(run, int(sys.argv[3]), Path(sys.argv[4])))
        else:
            print(fail(run, sys.argv[3]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
