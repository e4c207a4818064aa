"""Engines and world sizes against each other: the same losses, and checkpoints that go from any to any (contracts 5 and 6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import final, losses, small_config
from var_scale.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    **{f"zero{z}": {"name": "deepspeed", "deepspeed": {"zero_optimization": {"stage": z}}} for z in range(4)},
}
pytestmark = pytest.mark.slow


def run_many(root: Path, processes: int, jobs: list[dict[str, Any]]) -> None:
    """All jobs in one launch of so many processes."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(ROOT / "tests" / "train" / "many_runs.py"), str(root / "jobs.json")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def job(folder: Path, engine: dict[str, Any], train: dict[str, Any], model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "engine": engine, "train": train, "model": model or {}, **more}


@pytest.mark.parametrize("shared_aln", [False, True])
def test_hundred_steps_on_all_engines_and_world_sizes(shared_aln: bool, tmp_path: Path) -> None:
    """World sizes 1, 2 and 4, HSDP among them: losses of 100 float32 steps and the evaluation within 1e-5 relative."""
    small_config(tmp_path)
    recipe, model = {"steps": 100, "checkpoint_seconds": 1e6}, {"shared_aln": shared_aln}
    for processes in (1, 2, 4):
        jobs = [job(tmp_path / f"{name}-{processes}", engine, recipe, model) for name, engine in ENGINES.items()]
        if processes == 4:
            jobs.append(job(tmp_path / "hsdp-4", {"name": "fsdp", "shard": 2}, recipe, model))
        run_many(tmp_path, processes, jobs)
    want = losses(RunFolder(tmp_path / "ddp-1"))
    assert len(want) == 100 and want[-1] < want[0] - 0.3
    for path in sorted(tmp_path.glob("*-[124]")):
        np.testing.assert_allclose(losses(RunFolder(path)), want, rtol=1e-5, err_msg=path.name)
        evaluated = final(RunFolder(path))["loss_per_scale"]
        np.testing.assert_allclose(evaluated, final(RunFolder(tmp_path / "ddp-1"))["loss_per_scale"], rtol=1e-5, err_msg=path.name)


def test_every_engine_continues_every_other(tmp_path: Path) -> None:
    """Written by each engine at world 2 (HSDP at 4), continued by each at 1, 2 and 4; and written at 1, continued at 2. Averaged weights
    go along. The losses and the evaluation are those of the run that was not stopped; at the same world size and engine weights, moments
    and averages are bit for bit the same."""
    small_config(tmp_path)
    recipe = {"steps": 8, "keep_steps": [4], "checkpoint_seconds": 1e6, "ema": 0.9}
    hsdp = {"name": "fsdp", "shard": 2}
    run_many(tmp_path, 2, [job(tmp_path / f"{name}-2", engine, recipe) for name, engine in ENGINES.items()])
    run_many(tmp_path, 4, [job(tmp_path / "hsdp-4", hsdp, recipe)])
    run_many(tmp_path, 1, [job(tmp_path / "zero2-1", ENGINES["zero2"], recipe)])
    written = [*(f"{name}-2" for name in ENGINES), "hsdp-4"]
    for processes in (1, 2, 4):
        readers = ENGINES if processes < 4 else {name: ENGINES[name] for name in ("ddp", "zero1", "zero3")} | {"hsdp": hsdp}
        sources = [*written, "zero2-1"] if processes == 2 else written
        run_many(tmp_path, processes, [
            job(tmp_path / f"{source}-by-{name}-{processes}", engine, recipe, steps=[4], **{"from": str(tmp_path / source)})
            for source in sources for name, engine in readers.items()
        ])  # fmt: skip
    want, evaluated = losses(RunFolder(tmp_path / "ddp-2")), final(RunFolder(tmp_path / "ddp-2"))
    continued = sorted(tmp_path.glob("*-by-*"))
    assert len(continued) == 7 * 6 + 8 * 6 + 7 * 4
    for path in continued:
        folder = RunFolder(path)
        np.testing.assert_allclose(losses(folder), want[4:], rtol=1e-5, err_msg=path.name)
        for key in ("loss_per_scale", "ema_loss_per_scale"):
            np.testing.assert_allclose(final(folder)[key], evaluated[key], rtol=1e-5, err_msg=path.name)
    for name, engine in ENGINES.items():  # each in processes of its own, as real runs are: ZeRO 3 replaces torch's linear in its process
        for path, more in ((tmp_path / f"{name}-whole", {}), (tmp_path / f"{name}-rest", {"from": str(tmp_path / f"{name}-whole")})):
            run_many(tmp_path, 2, [job(path, engine, recipe, steps=[4], **more)])
        one, two = (tmp_path / f"{name}-{part}/checkpoints/step-00000008/state.json" for part in ("whole", "rest"))
        assert json.loads(one.read_text())["files"] == json.loads(two.read_text())["files"], name
