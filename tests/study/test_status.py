"""The table of a study's runs; commands that do not compute start without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.raises import raises
from tests.study.mini import MINI, mini
from tests.synthetic_study import ladder, write_folder
from var_scale.config.load import write_config
from var_scale.locks import take_lock
from var_scale.study.results import update_summary
from var_scale.study.status import status_table
from var_scale.study.study import Study


def written(runs: Path, *overrides: str) -> Study:
    """A study with folders of all its runs; none of them has started."""
    study = mini(runs, *overrides)
    for config, run in study.runs():
        write_config(config, run.config)
        run.set_status("created")
    return study


def test_the_state_of_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is `running` counts as interrupted when no process holds its lock."""
    study = written(tmp_path)
    runs = [run for _, run in study.runs()]
    runs[0].set_status("complete", step=24, total_steps=24, restarts=7)
    runs[1].set_status("running", total_steps=24)
    runs[2].set_status("running", total_steps=24)
    row = {"kind": "train", "step": 8, "loss": 3.25, "seconds": 4.0, "step_seconds": 60.0}
    runs[2].append_metrics({**row, "images_per_second": 1234.0})
    runs[4].config.unlink()
    lock = take_lock(runs[2].path / ".lock")
    assert lock is not None
    assert status_table(study) == {"complete", "interrupted", "running", "created", "not started"}
    os.close(lock)
    lines = capsys.readouterr().out.splitlines()
    shown = {config.name: next(x for x in lines if config.name in x) for config, _ in study.runs()}
    assert "24/24" in shown["d01-s0"] and " 7 " in shown["d01-s0"]
    for text in ("running", "8/24", "3.2500", "1,234", "16 min"):
        assert text in shown["d03-s0"]
    assert "running" not in status_table(study)


def test_a_study_without_a_folder(tmp_path: Path) -> None:
    with raises("study.folder-missing", "mini"):
        status_table(mini(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["plan", "study.device=h100"],
        ["run", "engine=ddp", "cluster=dev", "study.device=h100", "--on", "slurm", "--dry-run"],
        ["stop"],
    ],
)
def test_what_does_not_compute_does_not_import_torch(command: list[str], tmp_path: Path) -> None:
    """This also holds for a tokenizer whose weights are on the hub."""
    hub = "tokenizer.weights=hf://owner/name/file.pth"
    written(tmp_path, hub)
    arguments = [command[0], *MINI, hub, *command[1:], "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "var_scale.cli", "study", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "var_scale.study.study" in imported
    assert not imported & {"torch", "scipy", "matplotlib", "huggingface_hub"}


def test_the_summary_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between runs only the summary on wandb is updated: no report is written and nothing is
    drawn."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    study = mini(tmp_path, "log.wandb=offline")
    study.report.mkdir(parents=True)
    for (_, run), record in zip(study.runs()[:3], ladder(), strict=False):
        write_folder(record, run.path)
    update_summary(study)
    (folder,) = (study.report / "wandb").glob("offline-run-*mini-summary")
    assert any(folder.iterdir())
    assert [path.name for path in study.report.iterdir()] == ["wandb"]
