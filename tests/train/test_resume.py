"""A run stopped anywhere ends with the same weights (contract 6)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import losses, rewind, run, small_config
from var_scale.cluster.local import launch_command, launch_environment, run_local
from var_scale.errors import UserError
from var_scale.model.load import build_model, new_tokenizer
from var_scale.run_folder import EXIT_REQUEUE, RunFolder, take_lock
from var_scale.train.checkpoint import checkpoints
from var_scale.train.engine.single import SingleEngine
from var_scale.train.loop import create_run, newest_checkpoint
from var_scale.train.save import CheckpointWriter
from var_scale.train.step import TrainStep

TWO = {"name": "deepspeed", "processes": 2, "deepspeed": {"zero_optimization": {"stage": 1}}}
RECIPE = {"steps": 150, "precision": "bf16", "checkpoint_seconds": 0.3}


def start(config, path: Path) -> subprocess.Popen[bytes]:
    """Launch without waiting, in a session of its own."""
    create_run(config, path)
    return subprocess.Popen(launch_command(config, path), env=launch_environment(config), start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def wait_for(folder: RunFolder, rows: int, process: subprocess.Popen[bytes]) -> None:
    """Until metrics.jsonl has so many rows."""
    deadline = time.monotonic() + 90
    while len(folder.read_metrics()) < rows:
        assert process.poll() is None and time.monotonic() < deadline, (folder.path / "status.json").read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """The same run without a stop."""
    root = tmp_path_factory.mktemp("whole")
    code, folder = run(small_config(root, train=RECIPE, engine=TWO), root / "run")
    assert code == 0, (folder.log / "launch.log").read_text()[-3000:]
    return root, folder


def same_weights(a: RunFolder, b: RunFolder) -> bool:
    """Bit-identical weights and moments of the last checkpoints."""
    one, two = checkpoints(a.checkpoints)[-1], checkpoints(b.checkpoints)[-1]
    return one.step == two.step and one.state["files"] == two.state["files"]


def test_killed_anywhere_and_stopped_politely(whole: tuple[Path, RunFolder], tmp_path: Path) -> None:
    """kill -9 of all processes, kill -9 of one rank's launcher, then a stop on request: bit-identical final weights."""
    root, reference = whole
    config, path = small_config(root, train=RECIPE, engine=TWO), tmp_path / "run"
    folder = RunFolder(path)

    process = start(config, path)
    wait_for(folder, 40, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    process = start(config, path)
    wait_for(folder, len(folder.read_metrics()) + 20, process)
    process.kill()  # only the launcher: the ranks notice and stop by themselves
    process.wait()

    process = start(config, path)  # waits for the lock until they are gone
    wait_for(folder, len(folder.read_metrics()) + 20, process)
    (path / "STOP").touch()
    process.wait(timeout=60)
    assert folder.status()["state"] == "preempted"

    assert run_local(config, folder, "test") == 0
    assert folder.status()["restarts"] == 3
    assert same_weights(reference, folder)
    assert losses(folder) == losses(reference)


def test_a_checkpoint_means_that_its_evaluation_is_there(tmp_path: Path) -> None:
    """Stopped at the very step of an evaluation, or after the last one but before the end was noted: every evaluation is there once."""
    recipe = {"steps": 20, "evals": 4, "checkpoint_seconds": 1e-6, "keep_checkpoints": 100}
    code, whole = run(small_config(tmp_path, train=recipe), tmp_path / "whole")
    assert code == 0
    for step in (10, 20):
        rewind(whole, step)
        code, again = run(small_config(tmp_path, train=recipe), tmp_path / "whole")
        assert code == 0
        assert [row["step"] for row in again.read_metrics() if row["kind"] == "eval"] == [5, 10, 15, 20]


def small_engine(root: Path) -> SingleEngine:
    """An engine after one step."""
    config = small_config(root)
    tokenizer = new_tokenizer(config.tokenizer)
    module = TrainStep(build_model(config, tokenizer, torch.device("cpu")), tokenizer.quantize, config.train, "fp32")
    engine = SingleEngine(module, config.train)
    engine.create_state(1)
    return engine


def write(engine: SingleEngine, folder: Path, step: int, keep: int = 2) -> None:
    """One checkpoint, whole on disk."""
    writer = CheckpointWriter(folder, 0, 1, "life", keep)
    writer.save(engine, {"step": step})
    writer.wait()


def test_left_overs_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """The next life clears what a kill in the middle of a save left."""
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000007.earlier.tmp").mkdir(parents=True)
    write(small_engine(tmp_path), folder, 9)
    assert [p.name for p in folder.iterdir()] == ["step-00000009"]


def test_death_before_the_first_step_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier life said is not taken for the end of this one; a second launcher is refused."""
    config = small_config(tmp_path)
    folder = create_run(config, tmp_path / "run")
    folder.set_status("preempted", "stopped yesterday")
    monkeypatch.setattr("var_scale.cluster.local.launch_command", lambda *_: ["false"])
    assert run_local(config, folder, "test") == 1
    assert folder.status()["state"] == "failed"
    lock = take_lock(folder.path / ".launcher.lock")
    assert lock is not None
    with pytest.raises(UserError, match="another process"):
        run_local(config, folder, "test")
    os.close(lock)


def test_an_old_stop_file_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a cluster starts again, with nobody who removes the STOP file of the life before; and a disk without locks."""
    config = small_config(tmp_path)
    folder = create_run(config, tmp_path / "run")
    (folder.path / "STOP").touch()
    environment = {k: v for k, v in launch_environment(config).items() if k != "VAR_SCALE_PARENT"}
    assert subprocess.run(launch_command(config, folder.path), env=environment, capture_output=True, check=False).returncode == 0
    assert folder.status()["state"] == "complete"

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("var_scale.run_folder.fcntl.flock", no_locks)
    assert take_lock(tmp_path / "lock") is not None


def test_stop_signal_saves_and_asks_for_a_requeue(tmp_path: Path) -> None:
    """SIGTERM: finish the step, save, `preempted`, exit code 85."""
    config = small_config(tmp_path, train={"steps": 100000, "checkpoint_seconds": 1000})
    process = start(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    wait_for(folder, 20, process)
    process.terminate()
    assert process.wait(timeout=30) == EXIT_REQUEUE
    assert folder.status()["state"] == "preempted"
    assert checkpoints(folder.checkpoints)[-1].step == folder.status()["step"]


def test_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    """Only complete checkpoints are seen; a damaged one is named; the files are plain safetensors."""
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
    assert set(stored) == {f"{kind}/{name}@0" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in weights}
    assert all(torch.equal(found[-1].tensors()[name], tensor) for name, tensor in weights.items())
    part = found[-1].folder / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="step-00000003"):
        found[-1].check()


def test_a_rank_that_cannot_write_stops_the_save(tmp_path: Path) -> None:
    """Rank 0 does not wait for a part that will not come; nothing that looks like a checkpoint is left."""
    engine, folder = small_engine(tmp_path), tmp_path / "checkpoints"
    writer = CheckpointWriter(folder, 0, 2, "life", 2)
    temporary = folder / ".step-00000003.life.tmp"
    temporary.mkdir(parents=True)
    (temporary / "part-00001.failed").touch()
    writer.save(engine, {"step": 3})
    with pytest.raises(UserError, match="part-00001 could not be written"):
        writer.wait()
    assert not checkpoints(folder) and not temporary.exists()


def test_another_precision_is_refused(tmp_path: Path) -> None:
    """`auto` may mean another precision on another machine: a run stays with the one it began with."""
    config = small_config(tmp_path, train={"steps": 6, "keep_steps": [3]})
    code, folder = run(config, tmp_path / "run")
    assert code == 0
    rewind(folder, 3)
    state = folder.checkpoints / "step-00000003" / "state.json"
    state.write_text(state.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    assert run_local(config, folder, "test") != 0
    assert "set train.precision=bf16" in folder.status()["reason"]


def test_smaller_micro_batches_go_on(tmp_path: Path) -> None:
    """Out of memory is answered with more micro-batches: the same run goes on, with the same losses."""
    code, folder = run(small_config(tmp_path, train={"keep_steps": [8]}), tmp_path / "run")
    before = losses(folder)
    assert code == 0
    rewind(folder, 8)
    code, folder = run(small_config(tmp_path, train={"keep_steps": [8], "accumulate": 4}), tmp_path / "run")
    assert code == 0 and losses(folder) == pytest.approx(before, rel=1e-5) and losses(folder) != before


def test_the_end_of_a_process_runs_nothing_that_may_abort() -> None:
    """With gloo the interpreter's own exit aborts now and then after all work is done; `leave` goes around it."""
    text = ("import atexit, torch; from var_scale.train.world import World, leave; atexit.register(print, 'exit ran'); print('work done'); "
            "leave(World(0, 1, 0, torch.device('cpu')), 85)")  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (85, "work done\n"), ended.stderr


def test_other_config_or_data_is_refused(tmp_path: Path) -> None:
    """A run folder belongs to one config."""
    create_run(small_config(tmp_path), tmp_path / "run")
    with pytest.raises(UserError, match="another config"):
        create_run(small_config(tmp_path, train={"base_lr": 0.2}), tmp_path / "run")


def test_a_rank_that_fails_alone_is_heard(tmp_path: Path) -> None:
    """Rank 0 waits in a collective while rank 1 breaks: status.json names the rank and its reason, not an end without a word."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import var_scale.train.loop as loop\n"
        "    def broken(self, step):\n"
        "        raise ValueError('a broken card')\n"
        "    loop.Run._step = broken\n"
    )
    config = small_config(tmp_path / "data", engine={"name": "ddp", "processes": 2})
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(tmp_path)
    try:
        code, folder = run(config, tmp_path / "run")
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    assert code != 0
    status = folder.status()
    assert status["state"] == "failed" and status["reason"] == "rank 1: ValueError: a broken card", status


def test_checkpoints_at_shares_of_the_run_stay(tmp_path: Path) -> None:
    """Also before the first row of metrics; `newest_checkpoint` finds each by its step, and one that is not there is named."""
    config = small_config(tmp_path, train={"steps": 20, "keep_at": [0.1, 0.5], "keep_checkpoints": 1}, log={"every": 10})
    code, folder = run(config, tmp_path / "run")
    assert code == 0
    assert [c.step for c in checkpoints(folder.checkpoints)] == [2, 10, 20]
    assert [newest_checkpoint(folder.path, step)[1].step for step in (2, 10, None)] == [2, 10, 20]
    with pytest.raises(UserError, match="no checkpoint of step 3; there are those of 2, 10, 20"):
        newest_checkpoint(folder.path, 3)
