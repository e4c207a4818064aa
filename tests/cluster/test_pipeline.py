"""A whole study in miniature, for real: images, tokenizer, tokens, runs, report; killed on the way, continued, done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from var_scale.cluster.pipeline import Study
from var_scale.config.load import load
from var_scale.study.record import read_runs_csv

MINI = [
    "study/tiny", "name=mini", "engine=single", "data.leaves.train_images=512", "data.leaves.val_images=128", "data.samples_per_shard=128",
    "tokenizer.train.steps=40", "tokenizer.train.batch_size=16", "tokenizer.vocab_size=32",
    "tokenizer.hidden=32", "tokenizer.latent_channels=8",
    "train.epochs=null", "train.steps=24", "train.batch_size=16", "train.evals=2", "train.precision=fp32", "train.checkpoint_seconds=0.5",
    "log.every=2", "log.tensorboard=false", "study.depths=[1,2,3,4,5]", "study.samples_per_class=2", "study.sample_classes=3",
]  # fmt: skip


def study(runs: Path) -> subprocess.Popen[str]:
    """Start the study in a process group of its own."""
    command = [sys.executable, "-m", "var_scale.cli", "study", "run", *MINI, "--runs", str(runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Its output; it must end well."""
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text[-3000:]
    return text


def wait_until(condition, process: subprocess.Popen[str]) -> None:
    """Poll until the study has come so far."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_continued_and_done(tmp_path: Path) -> None:
    """kill -9 while the tokenizer trains and while a model trains, Ctrl-C later; the end is complete, and the next call does nothing."""
    folder = tmp_path / "mini"

    process = study(tmp_path)
    wait_until((folder / "images" / "val" / "manifest.json").exists, process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    process = study(tmp_path)
    wait_until((folder / "d02-s0" / "metrics.jsonl").exists, process)
    process.kill()  # the run itself notices and stops
    process.communicate()

    process = study(tmp_path)
    wait_until((folder / "d04-s0" / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130

    text = finish(study(tmp_path))
    assert "tokenizer: already trained" in text and "run d01-s0: complete" in text
    report = folder / "report"
    for name in ("report.md", "report.html", "runs.csv", "fit.json", "laws.png", "laws.svg", "compute.png", "residuals.png", "samples.png"):
        assert (report / name).stat().st_size > 500, name
    records = read_runs_csv(report / "runs.csv")
    assert [r.depth for r in records] == [1, 2, 3, 4, 5]
    assert all(r.state == "complete" and r.eval_samples == 128 and len(r.curve) == 2 for r in records)
    assert (folder / "tokenizer" / "reconstructions.png").exists() and (folder / "plan.json").exists()
    holdouts = json.loads((report / "fit.json").read_text())["holdouts"]
    assert {h["metric"] for h in holdouts if h["form"] == "power"} == {"loss_last", "loss_avg", "err_last", "err_avg"}
    assert all(h["held"] == ["d05-s0"] for h in holdouts)

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert "nothing to do" in finish(study(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_another_recipe_needs_another_name(tmp_path: Path) -> None:
    """A study folder belongs to its runs; nothing is spent before that is found out."""
    from var_scale.cluster.pipeline import check_runs
    from var_scale.config.load import write_config
    from var_scale.errors import UserError

    config = load(MINI[0], MINI[1:])
    first, run = Study(config, tmp_path).runs()[0]
    write_config(first, run.config)
    check_runs(Study(config, tmp_path))
    with pytest.raises(UserError, match="another config"):
        check_runs(Study(load(MINI[0], [*MINI[1:], "train.base_lr=1"]), tmp_path))
