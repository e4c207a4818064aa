"""A run that is stopped at any point and continued ends with the same weights."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.raises import raises
from tests.ranks import Ranks
from tests.runs import (
    ENGINES,
    final,
    launch_log,
    losses,
    rewind,
    run,
    run_here,
    small_config,
)
from var_scale.jobs.local import (
    launch_command,
    launch_environment,
    run_local,
    wait_for_ranks,
)
from var_scale.locks import take_lock
from var_scale.model.load import build_model, new_tokenizer
from var_scale.run_folder import EXIT_REQUEUE, RunFolder
from var_scale.train.checkpoint import checkpoints, newest_checkpoint
from var_scale.train.create import create_run
from var_scale.train.engine.single import SingleEngine
from var_scale.train.fault import FAULT_ENV
from var_scale.train.save import CheckpointWriter
from var_scale.train.step import TrainStep

RECIPE = {"steps": 150, "precision": "bf16", "checkpoint_seconds": 0.3}


def start(config, path: Path) -> subprocess.Popen[bytes]:
    """Launch without waiting, in a separate session, with a pause in each step: ranks look at their
    launcher twice a second and must not complete the run before they see that it was killed."""
    create_run(config, path)
    return subprocess.Popen(
        launch_command(config, path),
        env=launch_environment(config) | {FAULT_ENV: "0:*:sleep=0.02"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def train_on(folder: RunFolder, rows: int, process: subprocess.Popen[bytes], attempt: int) -> None:
    """Wait until this attempt, counted from 0, trains, and then for so many more rows of
    metrics.jsonl. The ranks of the attempt before it may still write some while it starts."""
    deadline, before = time.monotonic() + 90, None
    while before is None or len(folder.read_metrics()) < before + rows:
        assert process.poll() is None and time.monotonic() < deadline, folder.status()
        status = folder.status()
        if before is None and (status["state"], status["restarts"]) == ("running", attempt):
            before = len(folder.read_metrics())
        time.sleep(0.02)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a launcher and of its ranks, which have sessions of their own."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    for one in (psutil.Process(process.pid), *ranks):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(ranks, timeout=10)


def same_weights(a: RunFolder, b: RunFolder) -> bool:
    """Bit-identical weights and moments of the last checkpoints."""
    one, two = checkpoints(a.checkpoints)[-1], checkpoints(b.checkpoints)[-1]
    return one.step == two.step and one.state["files"] == two.state["files"]


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_killed_anywhere_and_stopped_on_request(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """kill -9 of all processes, kill -9 of the launcher, then in the slow case a STOP file: the
    weights at the end are bit-identical. That run is launched and the run without a stop is not: a
    launch changes no bit."""
    config = small_config(tmp_path / "data", train=RECIPE, engine=ENGINES[name])
    code, reference = ranks.run(config, tmp_path / "whole")
    assert code == 0, launch_log(reference)[-3000:]
    path = tmp_path / "run"
    folder = RunFolder(path)

    process = start(config, path)
    train_on(folder, 40, process, attempt=0)
    kill_all(process)

    process = start(config, path)
    train_on(folder, 20, process, attempt=1)
    process.kill()  # only the launcher: the ranks notice and stop without help
    process.wait()

    attempts = 2
    if name == "zero1":
        attempts = 3
        process = start(config, path)  # waits for the lock until they have ended
        train_on(folder, 20, process, attempt=2)
        (path / "STOP").touch()
        process.wait(timeout=60)
        assert folder.status()["state"] == "preempted"

    wait_for_ranks(path)
    assert ranks.run(config, path)[0] == 0, launch_log(folder)[-3000:]
    assert folder.status()["restarts"] == attempts
    assert same_weights(reference, folder)
    assert losses(folder) == losses(reference)


def test_a_checkpoint_means_that_its_evaluation_exists(tmp_path: Path) -> None:
    """A run is stopped at the step of an evaluation, or after the last one but before the end is
    recorded: every evaluation exists once."""
    recipe = {"steps": 20, "evals": 4, "checkpoint_seconds": 1e-6, "keep_checkpoints": 100}
    code, whole = run_here(small_config(tmp_path, train=recipe), tmp_path / "whole")
    assert code == 0
    for step in (10, 20):
        rewind(whole, step)
        code, again = run_here(small_config(tmp_path, train=recipe), tmp_path / "whole")
        assert code == 0
        assert [row["step"] for row in again.read_metrics() if row["kind"] == "eval"] == [
            5,
            10,
            15,
            20,
        ]


def small_engine(root: Path) -> SingleEngine:
    """An engine after one step."""
    config = small_config(root)
    tokenizer = new_tokenizer(config.tokenizer)
    module = TrainStep(
        build_model(config, tokenizer, torch.device("cpu")),
        tokenizer.quantize,
        config.train,
        "fp32",
    )
    engine = SingleEngine(module, config.train)
    engine.create_state(1)
    return engine


def write(engine: SingleEngine, folder: Path, step: int, keep: int = 2) -> None:
    """Write one complete checkpoint to disk."""
    writer = CheckpointWriter(folder, 0, 1, "life", keep)
    writer.save(engine, {"step": step})
    writer.wait()


def test_left_overs_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """The next attempt removes what a kill in the middle of a save left."""
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000007.earlier.tmp").mkdir(parents=True)
    write(small_engine(tmp_path), folder, 9)
    assert [p.name for p in folder.iterdir()] == ["step-00000009"]


def test_death_before_the_first_step_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status of an earlier attempt is not mistaken for the end of this one. A second launcher
    is refused."""
    config = small_config(tmp_path)
    folder = create_run(config, tmp_path / "run")
    folder.set_status("preempted", "stopped by an earlier attempt")
    monkeypatch.setattr("var_scale.jobs.local.launch_command", lambda *_: ["false"])
    assert run_local(config, folder, "test") == 1
    assert folder.status()["state"] == "failed"
    lock = take_lock(folder.path / ".launcher.lock")
    assert lock is not None
    with raises("jobs.run-locked"):
        run_local(config, folder, "test")
    os.close(lock)


def test_an_old_stop_file_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that a cluster starts again removes the STOP file of the previous attempt. It gives
    the same bits and rows as `run_here`, which most tests use. The disk of this test has no
    locks."""
    config = small_config(tmp_path)
    folder = create_run(config, tmp_path / "run")
    (folder.path / "STOP").touch()
    environment = {k: v for k, v in launch_environment(config).items() if k != "VAR_SCALE_PARENT"}
    ended = subprocess.run(
        launch_command(config, folder.path), env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stdout
    assert folder.status()["state"] == "complete"
    code, here = run_here(config, tmp_path / "here")
    assert code == 0 and same_weights(folder, here) and losses(folder) == losses(here)
    assert final(folder)["loss_per_scale"] == final(here)["loss_per_scale"]
    assert folder.status().keys() == here.status().keys()
    assert {path.name for path in folder.path.iterdir()} - {
        path.name for path in here.path.iterdir()
    } <= {".lock"}

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("var_scale.locks.fcntl.flock", no_locks)
    assert take_lock(tmp_path / "lock") is not None


def test_stop_signal_saves_and_asks_for_a_requeue(tmp_path: Path) -> None:
    """SIGTERM: the step finishes, the run saves, the state is `preempted`, and the exit code is 85.
    (For a launch: tests/jobs.)"""
    config = small_config(tmp_path, train={"steps": 100000, "checkpoint_seconds": 1000})
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while len(RunFolder(tmp_path / "run").read_metrics()) < 20:
            time.sleep(0.02)
        assert signal.getsignal(signal.SIGTERM) != before, "the run has ended already"
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, folder = run_here(config, tmp_path / "run")
    assert code == EXIT_REQUEUE and folder.status()["state"] == "preempted"
    assert 20 <= checkpoints(folder.checkpoints)[-1].step == folder.status()["step"] < 100000
    assert signal.getsignal(signal.SIGTERM) == before


def test_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    """Only complete checkpoints are found, a damaged one is named, and the files are plain
    safetensors."""
    engine, folder = small_engine(tmp_path), tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write(engine, folder, step)
    (folder / "step-00000009").mkdir()
    found = checkpoints(folder)
    assert [c.step for c in found] == [2, 3]
    for c in found:
        c.check()
    weights = {name: p.detach() for name, p in engine.names()}
    stored = load_file(found[-1].folder / "part-00000.safetensors")
    assert set(stored) == {
        f"{kind}/{name}@0" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in weights
    }
    assert all(torch.equal(found[-1].tensors()[name], tensor) for name, tensor in weights.items())
    part = found[-1].folder / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with raises("train.checkpoint-damaged", "step-00000003"):
        found[-1].check()


def test_a_rank_that_cannot_write_stops_the_save(tmp_path: Path) -> None:
    """Rank 0 does not wait for a part that will not arrive; nothing that looks like a checkpoint
    remains."""
    engine, folder = small_engine(tmp_path), tmp_path / "checkpoints"
    writer = CheckpointWriter(folder, 0, 2, "life", 2)
    temporary = folder / ".step-00000003.life.tmp"
    temporary.mkdir(parents=True)
    (temporary / "part-00001.failed").touch()
    writer.save(engine, {"step": 3})
    with raises("train.part-missing", "part-00001"):
        writer.wait()
    assert not checkpoints(folder) and not temporary.exists()


def test_another_precision_is_refused(tmp_path: Path) -> None:
    """`auto` may mean another precision on another machine: a run keeps the precision that it
    started with."""
    config = small_config(tmp_path, train={"steps": 6, "keep_steps": [3]})
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0
    rewind(folder, 3)
    state = folder.checkpoints / "step-00000003" / "state.json"
    state.write_text(state.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    assert run_here(config, folder.path)[0] != 0
    status = folder.status()
    assert status["cause"] == "train.checkpoint-other-precision", status
    assert "train.precision=bf16" in status["reason"]


def test_smaller_micro_batches_continue_a_run(tmp_path: Path) -> None:
    """More micro-batches need less memory: the same run continues with the same losses."""
    code, folder = run_here(small_config(tmp_path, train={"keep_steps": [8]}), tmp_path / "run")
    before = losses(folder)
    assert code == 0
    rewind(folder, 8)
    config = small_config(tmp_path, train={"keep_steps": [8], "accumulate": 4})
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0 and losses(folder) == pytest.approx(before, rel=1e-5)
    assert losses(folder) != before


def test_the_end_of_a_process_runs_nothing_that_may_abort() -> None:
    """With gloo the interpreter's own exit sometimes aborts after all work is done; `leave` does
    not run that exit."""
    text = (
        "import atexit, torch; from var_scale.train.world import World, leave; "
        "atexit.register(print, 'exit ran'); print('work done'); leave(World(0, 1, "
        "torch.device('cpu')), 85)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (85, "work done\n"), ended.stderr


def test_other_config_or_data_is_refused(tmp_path: Path) -> None:
    """A run folder belongs to one config from its first step on."""
    create_run(small_config(tmp_path, train={"base_lr": 0.1}), tmp_path / "run")
    folder = create_run(small_config(tmp_path), tmp_path / "run")
    folder.append_metrics({"kind": "train", "step": 1})
    with raises("train.run-other-config"):
        create_run(small_config(tmp_path, train={"base_lr": 0.2}), tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits in a collective while rank 1 fails: status.json names the rank and its error."""
    monkeypatch.setenv(FAULT_ENV, "1:3:raise")
    code, folder = run(small_config(tmp_path / "data", engine=ENGINES["ddp"]), tmp_path / "run")
    status = folder.status()
    assert code != 0 and status["state"] == "failed" and status["cause"] == "crashed", status
    assert "rank 1" in status["reason"] and "RuntimeError" in status["reason"]
    assert '"kind": "raise"' in (folder.log / "faults.jsonl").read_text()


def test_checkpoints_at_shares_of_the_run_stay(tmp_path: Path) -> None:
    """This also holds before the first row of metrics. `newest_checkpoint` finds each by its step,
    and names one that does not exist."""
    config = small_config(
        tmp_path,
        train={"steps": 20, "keep_at": [0.1, 0.5], "keep_checkpoints": 1},
        log={"every": 10},
    )
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0
    assert [c.step for c in checkpoints(folder.checkpoints)] == [2, 10, 20]
    assert [newest_checkpoint(folder.path, step)[1].step for step in (2, 10, None)] == [2, 10, 20]
    with raises("train.no-checkpoint", "2, 10, 20"):
        newest_checkpoint(folder.path, 3)
