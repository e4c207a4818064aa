"""What a SLURM job does at the end of an attempt, its header, and which nodes it leaves out."""

from __future__ import annotations

from pathlib import Path

from tests.raises import raises
from var_scale.config.load import load
from var_scale.jobs.job import HOLD, IDLE_ATTEMPTS, begin, end
from var_scale.jobs.nodes import bad
from var_scale.jobs.script import header, output, seconds
from var_scale.run_folder import RunFolder


def test_the_header_of_a_job(tmp_path: Path) -> None:
    """Without GPUs the header requests none; a folder that no #SBATCH line can hold is refused."""
    cluster = load("model/d16", ["cluster=dev"]).cluster
    assert not any("--gres" in line for line in header(cluster, "x", "y"))
    assert [seconds(text) for text in ("1-02:00:00", "00:30:00", "05:30")] == [93600, 1800, 330]
    assert output(tmp_path / "50%", "a-%j.out").endswith("/50%%/a-%j.out")
    with raises("jobs.folder-name", 'a"b'):
        output(tmp_path / 'a"b', "x")


def test_the_end_of_an_attempt(tmp_path: Path) -> None:
    """What the job does next follows from the state and the cause that the run recorded last."""
    run, log = RunFolder(tmp_path), tmp_path / "launch.log"

    def attempt(
        state: str, cause: str = "", step: int = 0, text: str = "", code: int = 1
    ) -> tuple[str, str]:
        """The verdict and the cause afterwards; the reason that the run records is "REASON"."""
        begin(run, "7_1")
        assert run.status()["state"] == "queued"
        if state != "queued":
            run.set_status(state, "REASON", cause=cause, step=step)  # type: ignore[arg-type]
        log.write_text(text)
        return end(run, code, log), run.status()["cause"]

    assert attempt("preempted", "stopped", 10) == ("again: REASON", "stopped")
    assert attempt("complete", step=20) == ("complete", "")
    assert run.status()["job_seconds"] >= 0
    assert attempt("diverged", "nonfinite", 3) == ("diverged: REASON", "nonfinite")
    assert attempt("failed", "out-of-memory", 4) == ("failed: REASON", "out-of-memory")
    assert attempt("failed", "lost-peer", 30) == ("again: REASON", "lost-peer")
    verdict, cause = attempt("running", step=40, text="exits with return code = -9")
    assert verdict.startswith("again: ") and "SIGKILL" in verdict and cause == "rank-killed"
    assert run.status()["state"] == "preempted" and run.status()["idle_attempts"] == 0
    (tmp_path / HOLD).touch()
    verdict, cause = attempt("preempted", "stopped", 50)
    assert verdict.startswith("held: ") and cause == "stopped"
    (tmp_path / HOLD).unlink()
    for _ in range(IDLE_ATTEMPTS - 1):
        verdict, cause = attempt("queued", code=9)
        assert verdict.startswith("again: ") and "exit code 9" in verdict and cause == "exited"
    verdict, cause = attempt("queued", code=9)
    assert verdict.startswith("failed: ") and cause == "no-steps"
    assert run.status()["state"] == "failed"


def test_an_attempt_that_began_under_an_earlier_version(tmp_path: Path) -> None:
    """The former keys of status.json still count."""
    run = RunFolder(tmp_path)
    earlier = {"life_began": 0.0, "life_step": 0, "idle_lives": IDLE_ATTEMPTS - 1}
    run.set_status("preempted", "stopped", step=0, **earlier)
    assert end(run, 85, tmp_path / "launch.log").startswith("failed: ")
    run.set_status("preempted", "stopped", step=5, **earlier)
    assert end(run, 85, tmp_path / "launch.log").startswith("again: ")
    assert run.status()["job_seconds"] > 1e9


def test_bad_nodes(tmp_path: Path) -> None:
    """Nodes are left out if their ranks reached an earlier point than those of others, or reported
    nothing; no node is left out if all reached the same point."""
    for rank, (host, stages) in enumerate([("n1", 2), ("n1", 3), ("n2", 1), ("n3", 3)]):
        text = "".join(f"ok {stage}\n" for stage in ("here", "reached", "exchanged")[:stages])
        (tmp_path / f"check-{rank}").write_text(f"host {host}\n{text}")
    assert bad(tmp_path, ["n1", "n2", "n3"]) == "n1,n2"
    assert bad(tmp_path, ["n3", "n4"]) == "n4"
    assert bad(tmp_path, ["n1"]) == ""
