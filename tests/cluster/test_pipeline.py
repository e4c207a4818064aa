"""A whole study in miniature, for real: images, tokenizer, tokens, runs, report; killed on the way, continued, done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_scale.cli import main
from var_scale.cluster.pipeline import Study, prepare_data, run_study
from var_scale.config.load import load
from var_scale.data.embedded import png_bytes
from var_scale.data.manifest import load_manifest
from var_scale.data.shards import ShardSetWriter
from var_scale.errors import UserError
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
    assert process.returncode == 85

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

    for name in ("images", "tokens", "d01-s0/checkpoints", "d05-s0/checkpoints"):  # a finished study needs none of these
        shutil.rmtree(folder / name)
    assert "nothing to do" in finish(study(tmp_path))
    (report / "laws.png").unlink()
    text = finish(study(tmp_path))
    assert "no checkpoint any more, the picture of before stays" in text and (report / "laws.png").exists()
    assert not (folder / "images").exists() and "nothing to do" in finish(study(tmp_path))


def test_another_recipe_needs_another_name(tmp_path: Path) -> None:
    """A study folder belongs to its runs; nothing is spent before that is found out."""
    from var_scale.cluster.pipeline import check_runs
    from var_scale.config.load import write_config

    config = load(MINI[0], MINI[1:])
    from var_scale.cluster.pipeline import make_report
    from var_scale.cluster.status import status_table

    first, run = Study(config, tmp_path).runs()[0]
    write_config(first, run.config)
    check_runs(Study(config, tmp_path))
    for call in (check_runs, make_report, status_table):  # a report of other settings would be false
        with pytest.raises(UserError, match="another config"):
            call(Study(load(MINI[0], [*MINI[1:], "train.base_lr=1"]), tmp_path))


@pytest.mark.slow
def test_a_diverged_size_does_not_stop_the_others_and_a_moved_study_still_samples(tmp_path: Path) -> None:
    """One size with an absurd rate: it is left out with its reason, the rest is fitted; the folder works elsewhere."""
    overrides = [*MINI, "study.overrides={2: {train.base_lr: 1.0e+30, train.clip: 0.0}}"]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "var_scale.cli", *arguments], capture_output=True, text=True, check=False)

    done = call("study", "run", *overrides, "--runs", str(tmp_path / "a"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "run d02-s0: diverged" in done.stdout and "gate: d02-s0 excluded, diverged" in done.stdout
    (tmp_path / "a").rename(tmp_path / "b")
    study = tmp_path / "b" / "mini"
    again = call("study", "run", *overrides, "--runs", str(tmp_path / "b"))
    assert "nothing to do" in again.stdout, again.stdout + again.stderr
    sample = call("sample", str(study / "d03-s0"), "--out", str(tmp_path / "s.png"), "--per-class", "1")
    assert sample.returncode == 0 and (tmp_path / "s.png").exists(), sample.stderr
    hopeless = call("study", "run", *MINI, "name=hopeless", "study.depths=[1]", "train.base_lr=1.0e+30", "train.clip=0", "--runs",
                    str(tmp_path / "c"))  # fmt: skip
    assert hopeless.returncode == 2 and "no run is healthy" in hopeless.stderr and (tmp_path / "c/hopeless/report/report.md").exists()
    fit = call("fit", str(study))
    assert "gate: d02-s0 excluded" in fit.stdout and "(4 points" in fit.stdout, fit.stdout + fit.stderr


def test_images_of_any_size(tmp_path: Path) -> None:
    """Photographs of several sizes are resized and cropped to what the tokenizer takes; several crops a training image."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        with ShardSetWriter(tmp_path / split, "image", split, 3, 16, {"name": "photographs"}) as writer:
            for i in range(count):
                side = int(rng.integers(40, 90))
                writer.add_image(png_bytes(rng.integers(0, 256, (side, side + 9, 3)).astype(np.uint8)), i % 3)
            writer.finish()
    given = ["data.leaves=null", f"data.images_train={tmp_path / 'train'}", f"data.images_val={tmp_path / 'val'}", "data.num_classes=3"]
    study = Study(load(MINI[0], [*MINI[1:], *given, "data.views=2"]), tmp_path)
    prepare_data(study)
    tokens = [load_manifest(study.folder / "tokens" / split) for split in ("train", "val")]
    assert [(m.num_samples, m.tokens["views"]) for m in tokens if m.tokens] == [(40, 2), (20, 1)]


def test_what_can_only_fail_later_is_refused_first(tmp_path: Path) -> None:
    """Images given beside the embedded set, a size the tokenizer does not take, a batch that does not divide."""
    for change, words in ((["data.images_train=x"], "both given"), (["data.leaves.size=36"], "takes images of 32x32 pixels"),
                          (["engine=zero1", "engine.processes=3"], "does not divide into 3 processes")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run_study(load(MINI[0], [*MINI[1:], *change]), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


def test_images_that_are_not_square(tmp_path: Path) -> None:
    """Wide images through every stage: generated, tokenised by scales of height x width, trained on, sampled, reported."""
    wide = ["tokenizer.patch_nums=[1,[1,2],[2,4],[2,5]]", "data.leaves.size=[16,40]", "train.steps=6", "tokenizer.train.steps=12",
            "study.depths=[1,2]", "name=wide"]  # fmt: skip
    run_study(load(MINI[0], [*MINI[1:], *wide]), tmp_path)
    folder = tmp_path / "wide"
    manifest = load_manifest(folder / "tokens" / "train")
    assert manifest.tokens is not None and manifest.tokens["length"] == 1 + 2 + 8 + 10
    assert manifest.tokens["patch_nums"] == [1, [1, 2], [2, 4], [2, 5]]
    final = [json.loads(line) for line in (folder / "d02-s0" / "metrics.jsonl").read_text().splitlines()][-1]
    assert len(final["loss_per_scale"]) == 4 and np.isfinite(final["loss_avg"])
    zoom = 96 // 16
    assert Image.open(folder / "report" / "samples.png").size == (2 * (40 * zoom + 2) - 2, 3 * (16 * zoom + 2) - 2)
    command = ["study", "quality", MINI[0], *MINI[1:], *wide, "--runs", str(tmp_path), "--count", "40"]
    main(command)
    quality = json.loads((folder / "report" / "quality.json").read_text())
    assert quality["count"] == 40 and quality["settings"]["cfg"] == 0 and quality["reference"].endswith("val")
    assert [row["run"] for row in quality["runs"]] == ["d01-s0", "d02-s0"] and all(row["FD-tok"] > 0 for row in quality["runs"])
    (images,) = (folder / "quality").glob("d01-s0-*.npz")
    before = images.stat().st_mtime_ns
    main(command)
    assert images.stat().st_mtime_ns == before and (folder / "report" / "quality.png").exists()
    with pytest.raises(UserError, match=r"set data.leaves.size=\[16, 40\]"):
        Study(load(MINI[0], [*MINI[1:], *wide, "data.leaves.size=32"]), tmp_path)
