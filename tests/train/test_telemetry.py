"""metrics.jsonl is the authoritative record; the mirrors follow it and may fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runs import final, launch_log, losses, run_here, small_config
from var_scale.run_folder import RunFolder


def test_mirrors(tmp_path: Path) -> None:
    """A real run with TensorBoard and wandb offline: both have files, and the run folder has every
    record."""
    config = small_config(tmp_path, log={"tensorboard": True, "wandb": "offline", "every": 5})
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0, launch_log(folder)[-3000:]
    assert list((folder.log / "tensorboard").glob("events.*"))
    assert list((folder.log / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(losses(folder)) == 4 and final(folder)["samples"] == 37
    assert folder.status()["state"] == "complete" and folder.status()["step"] == 20
    for name in ("config.yaml", "run.json", "env.json"):
        assert (folder.path / name).exists()


def test_broken_mirror_does_no_harm(tmp_path: Path) -> None:
    """If wandb cannot write, it is switched off with one warning."""
    config = small_config(
        tmp_path, log={"wandb": "online", "wandb_project": "not/allowed", "every": 10}
    )
    code, folder = run_here(config, tmp_path / "run")
    assert code == 0
    assert len(losses(folder)) == 2


def test_restart_rows_take_back(tmp_path: Path) -> None:
    """Rows after the step of a restart are no longer valid; a torn line is ignored, and the next
    append closes it."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"kind": "train", "step": step, "loss": 1.0})
    with open(folder.metrics, "a") as file:
        file.write('{"kind": "tra')
    folder.append_metrics({"kind": "restart", "step": 2})
    folder.append_metrics({"kind": "train", "step": 3, "loss": 2.0})
    rows = folder.read_metrics()
    assert [(r["kind"], r["step"]) for r in rows] == [
        ("train", 1),
        ("train", 2),
        ("restart", 2),
        ("train", 3),
    ]
    assert rows[-1]["loss"] == 2.0


def test_rows_of_older_versions(tmp_path: Path) -> None:
    """`evaluation_owed` was the key of a pending evaluation."""
    for key in ("evaluation_owed", "evaluation_pending"):
        folder = RunFolder(tmp_path / key)
        folder.append_metrics({"kind": "train", "step": 2})
        folder.append_metrics({"kind": "eval", "step": 2})
        folder.append_metrics({"kind": "restart", "step": 2, key: True})
        assert [row["kind"] for row in folder.read_metrics()] == ["train", "restart"]


def test_status_keeps_what_is_not_given(tmp_path: Path) -> None:
    """The state machine is one small file."""
    folder = RunFolder(tmp_path)
    folder.set_status("running", step=3, total_steps=9)
    folder.set_status("preempted", "asked", cause="stopped")
    status = folder.status()
    assert (status["state"], status["reason"], status["cause"]) == ("preempted", "asked", "stopped")
    assert (status["step"], status["total_steps"]) == (3, 9)
    folder.set_status("running")
    assert folder.status()["cause"] == "", "a cause belongs to one state"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_is_the_mean_over_all_samples(precision: str, tmp_path: Path) -> None:
    """The whole split is evaluated once, whatever the batch size: loss_avg is the token-weighted
    mean of the scales."""
    found = []
    for batch in (5, 64):
        code, folder = run_here(
            small_config(tmp_path, train={"eval_batch": batch, "precision": precision}),
            tmp_path / f"run{batch}",
        )
        assert code == 0
        row = final(folder)
        weights = [1 / 14, 4 / 14, 9 / 14]
        assert row["loss_avg"] == pytest.approx(
            sum(w * v for w, v in zip(weights, row["loss_per_scale"], strict=True)), rel=1e-9
        )
        assert row["loss_last"] == row["loss_per_scale"][-1]
        # With 37 images every part has one image.
        parts = np.array(row["loss_avg_blocks"])
        assert len(parts) == 37 and parts.mean() == pytest.approx(row["loss_avg"], rel=1e-9)
        assert parts.std(ddof=1) / 37**0.5 == pytest.approx(row["loss_avg_sem"], rel=1e-6)
        found.append(row["loss_avg"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
