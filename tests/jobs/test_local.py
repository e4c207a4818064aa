"""`var-scale train` as a batch script sees it: exit codes, signals, killed ranks.

Every command here is called from within another job, whose launcher variables describe other
processes, and in a folder whose files have the names of modules.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import ENGINES, small_config
from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.jobs.local import launch_command, launch_environment
from var_scale.run_folder import RunFolder
from var_scale.train.create import create_run

SURROUNDING = {
    "RANK": "3",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "TORCHELASTIC_RUN_ID": "other",
    "PET_NODE_RANK": "2",
    "PET_RDZV_ENDPOINT": "foo:1",
    "VAR_SCALE_WORLD": "7",
}


def start(config: Config, root: Path, *options: str) -> tuple[subprocess.Popen[str], RunFolder]:
    """Start the command on a config file with options of Python, in a separate session."""
    write_config(config, root / "one.yaml")
    for name in ("random.py", "secrets.py", "torch.py", "var_scale.py"):
        (root / name).write_text("raise SystemExit('a file of the working folder was imported')")
    script = Path(sys.executable).with_name("var-scale")
    command = [sys.executable, *options, str(script), "train", "one.yaml"]
    process = subprocess.Popen(
        [*command, "--folder", str(root / "run")],
        cwd=root,
        env={**os.environ, **SURROUNDING},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, RunFolder(root / "run")


def wait_for_rows(process: subprocess.Popen[str], folder: RunFolder, rows: int = 10) -> None:
    while len(folder.read_metrics()) < rows:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ddp", signal.SIGUSR1),
        pytest.param("zero1", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("single", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_stopped_it_asks_for_a_requeue(name: str, number: signal.Signals, tmp_path: Path) -> None:
    """After a signal to the command alone the ranks save; the command waits and ends with 85."""
    engine = ENGINES.get(name, {"name": name})
    process, folder = start(
        small_config(tmp_path / "data", engine=engine, train={"steps": 100000}), tmp_path
    )
    wait_for_rows(process, folder)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and folder.status()["state"] == "preempted", output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_signal_while_a_rank_imports_torch_is_not_lost(tmp_path: Path) -> None:
    """The rank saves after its first step."""
    config = small_config(tmp_path / "data", train={"steps": 100000})
    folder = create_run(config, tmp_path / "run")
    rank = subprocess.Popen(
        launch_command(config, folder.path),
        env=launch_environment(config) | {"PYTHONVERBOSE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert rank.stderr is not None
    # The first module of torch comes a second or more before training begins.
    assert any("import 'torch" in line for line in rank.stderr)
    rank.send_signal(signal.SIGTERM)
    rank.communicate(timeout=60)
    status = folder.status()
    assert rank.returncode == 85 and status["state"] == "preempted" and status["step"] <= 2, status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "zero1"])
def test_a_run_whose_reader_leaves_completes(name: str, tmp_path: Path) -> None:
    """`var-scale train ... | head -0`: the run does not end with its reader."""
    engine = ENGINES.get(name, {"name": name})
    process, folder = start(small_config(tmp_path / "data", engine=engine), tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and folder.status()["state"] == "complete"


def test_a_diverged_run_has_a_code_of_its_own(tmp_path: Path) -> None:
    """The command itself imports no torch, which would take longer than its other work."""
    process, folder = start(
        small_config(tmp_path / "data", train={"base_lr": 1e30, "clip": 0.0, "nonfinite": "stop"}),
        tmp_path,
        "-X",
        "importtime",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and folder.status()["state"] == "diverged", output
    imported = set(re.findall(r"\| +([\w.]+)$", output, flags=re.MULTILINE))
    assert "var_scale.jobs.local" in imported and "torch" not in imported


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(name: str, tmp_path: Path) -> None:
    """After kill -9 of rank 1 the recorded reason names the rank and the signal."""
    process, folder = start(
        small_config(tmp_path / "data", engine=ENGINES[name], train={"steps": 100000}), tmp_path
    )
    wait_for_rows(process, folder)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "var_scale.train.worker" in child.cmdline()
    ]
    next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
    output, _ = process.communicate(timeout=90)
    status = folder.status()
    if name == "ddp":
        assert status["cause"] == "rank-killed", status
        assert "rank 1" in status["reason"] and "SIGKILL" in status["reason"], status
    else:
        # DeepSpeed's launcher logs the signal only if it sees the killed rank before the ranks that
        # lost their connection to it.
        assert status["cause"] in ("rank-killed", "lost-peer"), status
    assert process.returncode == 2 and str(folder.path) in output, output


@pytest.mark.slow
def test_the_launcher_is_killed(tmp_path: Path) -> None:
    """After kill -9 of torchrun the ranks save without help, and the command reports the state of
    the run, not that of its launcher."""
    process, folder = start(
        small_config(
            tmp_path / "data", engine={"name": "fsdp", "processes": 2}, train={"steps": 100000}
        ),
        tmp_path,
    )
    wait_for_rows(process, folder)
    launcher = next(
        c for c in psutil.Process(process.pid).children() if "torch.distributed.run" in c.cmdline()
    )
    os.kill(launcher.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85 and folder.status()["state"] == "preempted", (
        output,
        folder.status(),
    )


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (None, ["0", "1"]),
        ("2,3", ["2", "3"]),
        ("7,5,3", ["7", "5"]),
        ("GPU-8932f937,MIG-GPU-8932f937/1/2", ["GPU-8932f937", "MIG-GPU-8932f937/1/2"]),
        ("", ["-1", "-1"]),
    ],
)
def test_deepspeed_keeps_the_visible_devices(
    given: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank of DeepSpeed's launcher sees the devices that this process sees."""
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    command = launch_command(small_config(tmp_path, engine=ENGINES["zero1"]), tmp_path)
    world = command[command.index("--world_info") + 1]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": seen}
