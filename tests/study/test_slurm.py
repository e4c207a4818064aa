"""Tests on a real SLURM (launch/dev-cluster): launchers, preemption, time limits, nodes that fail,
cancelled jobs, whole studies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import final, losses, run_here, small_config
from var_scale.config.load import config_root
from var_scale.config.schema import Config
from var_scale.jobs.script import run_script
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import checkpoints
from var_scale.train.create import create_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
DEV = config_root().parent / "launch" / "dev-cluster"
FSDP: dict[str, Any] = {"name": "fsdp", "processes": 2}
ZERO: dict[str, Any] = {
    "name": "deepspeed",
    "processes": 2,
    "deepspeed": {"zero_optimization": {"stage": 2}},
}
TWO = {
    "nodes": 2,
    "tasks_per_node": 1,
    "cpus_per_task": 1,
    "memory": "2G",
    "time": "00:30:00",
    "stop_seconds": 30,
    "check": False,
}


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Cluster:
    """The one-host cluster of this test session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, *argv: str) -> str:
        """Run a command of dev-cluster."""
        done = subprocess.run(
            [str(DEV), "--dir", str(self.folder), *argv],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *argv: str) -> str:
        """Run a command on the login host."""
        return self.call("run", *argv)

    def submit(self, run: RunFolder, *options: str) -> str:
        """Submit the script in a run's folder."""
        return self.run("sbatch", "--parsable", *options, str(run.path / "job.sh")).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ...; after the job has ended, the state that SLURM keeps."""
        return next(
            word
            for word in self.run("scontrol", "-o", "show", "job", job).split()
            if word.startswith("JobState=")
        ).split("=")[1]

    def wait(self, job: str, *states: str, seconds: float = 150) -> str:
        """Wait until the job is in one of `states` (default: until its end)."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in (states or ENDED):
            assert time.monotonic() < deadline, f"job {job} is {state}"
            time.sleep(0.3)
        return state

    def finish(self, job: str) -> str:
        """Wait for the job's end, starting it at once however often it comes back."""
        deadline = time.monotonic() + 300
        while (state := self.wait(job, "PENDING", *ENDED, seconds=300)) == "PENDING":
            assert time.monotonic() < deadline
            self.skip_delay(job)
        return state

    def start_now(self, job: str) -> None:
        """Wait until the job is requeued, and start it."""
        self.wait(job, "PENDING")
        self.skip_delay(job)

    def skip_delay(self, job: str) -> None:
        """Start a requeued job without the two minutes that SLURM makes it wait."""
        time.sleep(1.5)
        # scontrol fails if the job has just started by itself.
        self.run("bash", "-c", f"scontrol update jobid={job} starttime=now || true")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    found.call("up")
    yield found
    found.call("down")


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that needs seconds; two minutes are for a busy machine."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def job(tmp_path: Path, name: str, **changes: Any) -> tuple[Config, RunFolder]:
    """A run folder with its script, of the small model on two nodes."""
    settings = {"engine": FSDP, **changes, "cluster": TWO | changes.get("cluster", {})}
    config = small_config(tmp_path, **settings)
    run = create_run(config, tmp_path / name)
    run.log.mkdir(exist_ok=True)
    (run.path / "job.sh").write_text(run_script(config, run, "test"))
    return config, run


def logs_of(run: RunFolder) -> str:
    """Everything that a run and its job printed."""
    return "\n".join(
        path.read_text()
        for path in sorted(run.path.rglob("*.out")) + sorted(run.path.rglob("*.log"))
    )


SLOWED = {"train": {"steps": 200}, "log": {"every": 1}}
"""Long enough to be disturbed on the way."""


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [("deepspeed", ZERO), ("torchrun", FSDP), ("srun", FSDP), ("slurm", ZERO), ("pdsh", ZERO)],
)
def test_launchers(launcher: str, engine: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    """Each starts two ranks on two nodes, which reach the losses of one process here. Each rank has
    its own log, and the job's output contains that of rank 0."""
    code, here = run_here(small_config(tmp_path), tmp_path / "here")
    assert code == 0
    _, there = job(
        tmp_path,
        launcher,
        engine=engine,
        cluster={"launcher": launcher, "check": launcher == "srun"},
    )
    number = cluster.submit(there)
    assert cluster.wait(number) == "COMPLETED", logs_of(there)
    assert losses(there) == pytest.approx(losses(here), rel=1e-5)
    assert final(there)["loss_avg"] == pytest.approx(final(here)["loss_avg"], rel=1e-5)
    logs = there.log / f"{number}.0"
    assert (logs / "rank-1.log").exists() and "world=2" in (
        there.log / f"job-{number}.out"
    ).read_text()
    status = there.status()
    assert status["state"] == "complete" and status["job"] == number and status["job_seconds"] > 0
    if launcher == "srun":
        assert [(logs / f"check-{rank}").read_text() for rank in (0, 1)] == [
            f"host node{rank + 1}\nok here\nok reached\nok exchanged\n" for rank in (0, 1)
        ]


def test_preempted_and_back(cluster: Cluster, tmp_path: Path) -> None:
    """A job of higher priority takes the nodes: the run saves, is requeued without help, and ends
    with the bits of an undisturbed run. SLURM's signal before a time limit has the same effect."""
    _, alone = job(tmp_path, "alone", **SLOWED)
    assert cluster.wait(cluster.submit(alone)) == "COMPLETED", logs_of(alone)
    _, disturbed = job(tmp_path, "disturbed", **SLOWED)
    number = cluster.submit(disturbed)
    until(lambda: disturbed.status().get("state") == "running" and len(losses(disturbed)) > 20)
    other = cluster.run(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N2",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 3",
    ).strip()
    cluster.start_now(number)
    assert disturbed.status()["state"] == "preempted" and checkpoints(disturbed.checkpoints), (
        logs_of(disturbed)
    )
    cluster.wait(other)
    before = disturbed.status()["step"]
    until(lambda: len(losses(disturbed)) > before + 20)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.start_now(number)
    assert cluster.wait(number) == "COMPLETED", logs_of(disturbed)
    assert (
        checkpoints(disturbed.checkpoints)[-1].state["files"]
        == checkpoints(alone.checkpoints)[-1].state["files"]
    )
    assert losses(disturbed) == losses(alone) and disturbed.status()["restarts"] == 2


def test_a_node_dies(cluster: Cluster, tmp_path: Path) -> None:
    """The job is requeued and ends on the nodes that remain or return."""
    _, there = job(tmp_path, "run", **SLOWED, cluster={"requeues": 5})
    number = cluster.submit(there)
    until(lambda: len(losses(there)) > 20)
    cluster.call("kill", "node2")
    cluster.wait(number, "PENDING", seconds=90)
    cluster.call("start", "node2")
    time.sleep(2)
    # SLURM may still send the returned node the signal that ends the first attempt. It then stops
    # the second attempt, which saves and comes back as well.
    assert cluster.finish(number) == "COMPLETED", logs_of(there)
    assert len(losses(there)) == 200 and there.status()["restarts"] >= 1


def test_what_is_not_as_asked_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """A job with one node where two are needed is refused, and so is a launcher that starts too few
    ranks; a node that fails its check is left out."""
    _, there = job(tmp_path, "nodes")
    assert cluster.wait(cluster.submit(there, "--nodes=1")) == "FAILED"
    assert there.status()["cause"] == "nodes-differ"
    _, there = job(tmp_path, "ranks", engine=FSDP, cluster={"launcher": "srun"})
    script = (there.path / "job.sh").read_text()
    assert '--ntasks="$VAR_SCALE_WORLD"' in script
    (there.path / "job.sh").write_text(
        script.replace('--ntasks="$VAR_SCALE_WORLD"', "--ntasks=2").replace(
            "VS_NODES *", "2 * VS_NODES *"
        )
    )
    assert cluster.wait(cluster.submit(there)) == "FAILED"
    numbers = re.findall(r"\d+", there.status()["reason"])
    assert {"2", "4"} <= set(numbers), logs_of(there)
    broken = tmp_path / "python"
    fault = '[ "$3 $(hostname)" != "check node1" ] || exit 1'
    broken.write_text(f'#!/bin/bash\n{fault}\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    _, there = job(
        tmp_path,
        "bad",
        engine=FSDP,
        cluster={"python": str(broken), "check": True, "env": {"VAR_SCALE_CHECK_SECONDS": "5"}},
    )
    number = cluster.submit(there)
    until(lambda: "ExcNodeList=node1" in cluster.run("scontrol", "-o", "show", "job", number))
    text = (there.log / f"job-{number}.out").read_text()
    assert "without node1" in text and len(text.splitlines()) < 8, text
    cluster.run("scancel", number)


def test_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """scancel: the run saves, its job is not requeued, and no process remains. When the same job is
    submitted again, it finishes the run."""
    _, there = job(tmp_path, "run", **SLOWED)
    number = cluster.submit(there)
    until(lambda: len(losses(there)) > 20)
    cluster.run("scancel", number)
    assert cluster.wait(number) == "CANCELLED"
    until(lambda: there.status()["state"] == "preempted")
    assert (
        str(there.path)
        not in subprocess.run(
            ["ps", "-eo", "args"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert cluster.wait(cluster.submit(there)) == "COMPLETED", logs_of(there)
    assert len(losses(there)) == 200


def test_a_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM sends the signal before the end without a request; the run saves and waits for its next
    attempt."""
    _, there = job(
        tmp_path,
        "run",
        train={"steps": 100000, "checkpoint_seconds": 1000},
        cluster={"time": "00:02:00", "stop_seconds": 15},
    )
    number = cluster.submit(there)
    cluster.wait(number, "RUNNING", seconds=60)
    cluster.wait(number, "PENDING", seconds=150)
    status = there.status()
    assert (
        status["state"] == "preempted"
        and status["step"] == checkpoints(there.checkpoints)[-1].step > 0
    ), logs_of(there)
    cluster.run("scancel", number)


STUDY = [
    "study/tiny",
    "name=sweep",
    "cluster=dev",
    "cluster.check=false",
    "engine=ddp",
    "data.shapes.train_images=256",
    "data.shapes.val_images=64",
    "tokenizer.train.steps=10",
    "tokenizer.train.batch_size=16",
    "tokenizer.vocab_size=32",
    "tokenizer.hidden=32",
    "tokenizer.latent_channels=8",
    "train.epochs=null",
    "train.steps=40",
    "train.batch_size=16",
    "train.precision=fp32",
    "log.every=2",
    "log.tensorboard=false",
    "study.depths=[1,2,3]",
    "study.depth_seeds=null",
    "study.overrides=null",
    "study.rates=null",
    "study.parallel=1",
    "study.quality_samples=0",
    "study.samples_per_class=1",
    "study.sample_classes=2",
]


def test_submitting_again_does_not_touch_what_is_queued(cluster: Cluster, tmp_path: Path) -> None:
    """A run that is stopped and submitted again leaves the tasks of the first array their own runs.
    A stop takes effect while a job still sets up its environment. A line of the setup that fails is
    the reason that the run records. Nothing stays queued when sbatch refuses a job."""
    os.chdir(tmp_path)
    command = [sys.executable, "-m", "var_scale.cli", "study"]
    data = [*STUDY, "name=again", "cluster.at_once=1", "cluster.setup=[sleep 8]", "train.steps=300"]
    cluster.run(*command, "prepare", *data)
    cluster.run(*command, "run", *data, "--on", "slurm")
    jobs = json.loads((tmp_path / "runs/again/slurm/jobs.json").read_text())
    runs = {d: RunFolder(tmp_path / f"runs/again/d0{d}-s0") for d in (1, 2, 3)}
    cluster.wait(f"{jobs['train']}_0", "RUNNING")
    cluster.run(*command, "stop", *data, "--only", "d01-s0,d02-s0")
    assert cluster.wait(f"{jobs['train']}_0") == "FAILED" and runs[1].status()["state"] in (
        "queued",
        "preempted",
    )
    assert "study stop" in "".join(
        p.read_text() for p in (tmp_path / "runs/again/slurm").glob("train-*_0.out")
    )
    cluster.run(*command, "run", *data, "--on", "slurm")
    assert (
        cluster.wait(f"{jobs['train']}_2", seconds=200) == "COMPLETED"
        and runs[3].status()["state"] == "complete"
    )
    cluster.run(*command, "stop", *data)
    failing = [
        *data,
        "name=failing",
        "data.shapes=null",
        "data.num_classes=10",
        "cluster.setup=[nosuchmodule load cuda]",
    ]
    failing += [f"data.tokens_{s}={tmp_path}/runs/again/tokens/{s}" for s in ("train", "val")]
    failing += [
        f"tokenizer.weights={tmp_path}/runs/again/tokenizer/tokenizer.safetensors",
        "study.depths=[1]",
    ]
    cluster.run(*command, "run", *failing, "--on", "slurm")
    reason = RunFolder(tmp_path / "runs/failing/d01-s0")
    until(lambda: reason.status()["state"] == "failed")
    assert reason.status()["cause"] == "setup-failed"
    assert "nosuchmodule load cuda" in reason.status()["reason"]
    assert "on node" in reason.status()["reason"]
    refused = [
        *failing,
        "name=refused",
        "study.depths=[1,2]",
        "study.overrides={2: {cluster.partition: nosuch}}",
    ]
    with pytest.raises(
        AssertionError,
        match=r"train-1.sh: sbatch: .*nosuch|train-1.sh: sbatch: .*[Ii]nvalid partition",
    ):
        cluster.run(*command, "run", *refused, "--on", "slurm")
    assert "refused" not in cluster.run("squeue", "-h", "-o", "%j")


def test_a_study(cluster: Cluster, tmp_path: Path) -> None:
    """From a YAML file to the report: data, three sizes as one array, report. A run that diverges
    does not stop the others; a second submission adds nothing; stop and retry."""
    os.chdir(tmp_path)
    wild = "study.overrides={3: {train.base_lr: 1.0e+30, train.clip: 0}}"
    command = [sys.executable, "-m", "var_scale.cli", "study"]
    submitted = cluster.run(*command, "run", *STUDY, wild, "--on", "slurm")
    assert "d03-s0: job" in submitted
    jobs = json.loads((tmp_path / "runs/sweep/slurm/jobs.json").read_text())
    again = cluster.run(*command, "run", *STUDY, wild, "--on", "slurm")
    assert "d03-s0: job" not in again
    assert jobs == json.loads((tmp_path / "runs/sweep/slurm/jobs.json").read_text())
    with pytest.raises(AssertionError, match="study stop"):  # its runs would be trained twice
        cluster.run(*command, "run", *STUDY, wild)
    cluster.wait(jobs["report"], seconds=240)
    states = [RunFolder(tmp_path / f"runs/sweep/d0{d}-s0").status()["state"] for d in (1, 2, 3)]
    assert states == ["complete", "complete", "diverged"], cluster.run(
        "bash", "-c", "tail -n 50 runs/sweep/slurm/*.out"
    )
    assert (tmp_path / "runs/sweep/report/report.html").exists() and (
        tmp_path / "runs/sweep/report/complete.json"
    ).exists()
    jobs_before = cluster.run("squeue", "-h", "-o", "%i")
    cluster.run(*command, "run", *STUDY, wild, "--on", "slurm")
    assert jobs == json.loads((tmp_path / "runs/sweep/slurm/jobs.json").read_text())
    assert cluster.run("squeue", "-h", "-o", "%i") == jobs_before
    table = cluster.run("env", "COLUMNS=200", *command, "status", *STUDY, wild)
    assert "diverged" in table and f"{jobs['train']}_2" in table
    assert "d03-s0: job" in cluster.run(*command, "retry", "runs/sweep/d03-s0")
    assert "d03-s0" in cluster.run(*command, "stop", *STUDY, wild, "--only", "d03-s0")
