"""`var-scale train` as a batch script sees it: exit codes, signals, ranks that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import small_config
from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.run_folder import RunFolder


def start(config: Config, root: Path) -> tuple[subprocess.Popen[str], RunFolder]:
    """The command on a config file, in a session of its own."""
    write_config(config, root / "one.yaml")
    command = [sys.executable, "-m", "var_scale.cli", "train", str(root / "one.yaml"), "--folder", str(root / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return process, RunFolder(root / "run")


def wait_for_rows(process: subprocess.Popen[str], folder: RunFolder, rows: int = 10) -> None:
    while len(folder.read_metrics()) < rows:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize(("name", "number"), [("ddp", signal.SIGUSR1), pytest.param("zero1", signal.SIGTERM, marks=pytest.mark.slow),
                                              pytest.param("single", signal.SIGINT, marks=pytest.mark.slow)])  # fmt: skip
def test_stopped_it_asks_for_a_requeue(name: str, number: signal.Signals, tmp_path: Path) -> None:
    """A signal to the command alone: the ranks save, the command waits for them and ends with 85."""
    deepspeed = {"zero_optimization": {"stage": 1}}
    engine = {"name": "deepspeed", "processes": 2, "deepspeed": deepspeed} if name == "zero1" else {"name": name, "processes": 2}
    process, folder = start(small_config(tmp_path / "data", engine=engine, train={"steps": 100000}), tmp_path)
    wait_for_rows(process, folder)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and folder.status()["state"] == "preempted", output
    assert "Traceback" not in output and output.rstrip().endswith("stopped; the same command continues from here")


def test_a_diverged_run_has_a_code_of_its_own(tmp_path: Path) -> None:
    process, folder = start(small_config(tmp_path / "data", train={"base_lr": 1e30, "clip": 0.0, "nonfinite": "stop"}), tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and folder.status()["state"] == "diverged", output


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(name: str, tmp_path: Path) -> None:
    """kill -9 of rank 1: what the person reads says so, and that nothing is lost; the same command goes on."""
    engine = {"name": name, "processes": 2}
    if name == "zero1":
        engine = {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": 1}}}
    process, folder = start(small_config(tmp_path / "data", engine=engine, train={"steps": 100000}), tmp_path)
    wait_for_rows(process, folder)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "var_scale.train.worker" in child.cmdline()]
    next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
    output, _ = process.communicate(timeout=90)
    reason = folder.status()["reason"]
    if name == "ddp":
        assert "rank 1 was ended by SIGKILL" in reason, reason
    else:  # DeepSpeed's launcher tells the signal only where it sees the killed rank before those that miss it
        assert "was ended by SIGKILL" in reason or "lost the connection to another rank: it was killed" in reason, reason
    assert process.returncode == 2 and "the same command continues" in output, output


@pytest.mark.slow
def test_the_launcher_is_killed(tmp_path: Path) -> None:
    """kill -9 of torchrun: the ranks save by themselves, and the command tells what became of the run, not of its launcher."""
    process, folder = start(small_config(tmp_path / "data", engine={"name": "fsdp", "processes": 2}, train={"steps": 100000}), tmp_path)
    wait_for_rows(process, folder)
    launcher = next(c for c in psutil.Process(process.pid).children() if "torch.distributed.run" in c.cmdline())
    os.kill(launcher.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and folder.status()["state"] == "preempted", (output, folder.status())


@pytest.mark.parametrize(("changes", "text"), [
    ({"engine": {"name": "ddp", "deepspeed": {"zero_optimization": {"stage": 2}}}}, "deepspeed is given, but name is ddp"),
    ({"engine": {"name": "ddp", "shard": 2}}, "shard is given, but name is ddp"),
    ({"engine": {"name": "deepspeed", "compile": True, "deepspeed": {"zero_optimization": {"stage": 3}}}}, "ZeRO 3 gathers weights"),
    ({"engine": {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": 9}}}},
     "engine.deepspeed.zero_optimization.stage: Input should be 0, 1, 2"),
    ({"engine": {"name": "fsdp", "processes": 3}, "train": {"batch_size": 9, "steps": 20}}, ""),
    ({"engine": {"name": "fsdp", "processes": 3}}, "8 does not divide into 3 processes"),
    ({"engine": {"name": "fsdp", "processes": 2, "shard": 4}}, "2 processes do not divide into groups of 4"),
    ({"train": {"scale_weights": [1, 2]}}, "2 weights for the 3 scales"),
    ({"train": {"scale_weights": [1, 2, -3]}}, "train.scale_weights.2: Input should be greater than or equal to 0 (given: -3)"),
    ({"train": {"progressive": 0.5, "progressive_start": 3}}, "3 of 3 scales; give 0 to 2"),
    ({"train": {"steps": "none"}}, "nothing is written null"),
])  # fmt: skip
def test_what_cannot_run_is_said_before_it_starts(changes: dict, text: str, tmp_path: Path) -> None:
    """No folder is made, nothing is launched."""
    from var_scale.cluster.pipeline import check_config
    from var_scale.errors import UserError

    if not text:
        check_config(small_config(tmp_path / "data", **changes))
        return
    with pytest.raises(UserError) as error:
        check_config(small_config(tmp_path / "data", **changes))
    assert text in str(error.value) and "\n" not in str(error.value)
