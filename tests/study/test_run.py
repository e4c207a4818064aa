"""A whole study in miniature: images, tokenizer, tokens, runs, report; it is killed several times
and continued."""

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

from tests.raises import raises
from tests.runs import final, run_here
from tests.study.mini import MINI, mini
from var_scale.cli import main
from var_scale.data.embedded import png_bytes
from var_scale.data.manifest import load_manifest
from var_scale.data.shards import ShardSetWriter
from var_scale.errors import UserError
from var_scale.records.record import METRICS
from var_scale.records.runs_csv import read_runs_csv
from var_scale.run_folder import RunFolder
from var_scale.study.checks import check_study_here
from var_scale.study.run import run_study
from var_scale.study.stages import prepare_data
from var_scale.study.study import Study
from var_scale.train.fault import FAULT_ENV

FEW = ["study.depths=[1,2,3,4]", "tokenizer.train.steps=16"]
WIDE = [
    "name=wide",
    "tokenizer.patch_nums=[1,[1,2],[2,4],[2,5]]",
    "data.shapes.size=[16,40]",
    "data.shapes.train_images=128",
    "train.steps=12",
    "tokenizer.train.steps=8",
    "study.quality_samples=10",
]
TOGETHER = "study.parallel=2"


def start(runs: Path, fault: str = "", *changes: str) -> subprocess.Popen[str]:
    """Start the command in its own process group."""
    command = [
        sys.executable,
        "-m",
        "var_scale.cli",
        "study",
        "run",
        *MINI,
        *FEW,
        *WIDE,
        *changes,
        "--runs",
        str(runs),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | ({FAULT_ENV: fault} if fault else {}),
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the study has written this file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def times(folder: Path) -> dict[Path, int]:
    """The modification time of every file."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.xdist_group("study")
def test_stopped_continued_and_done(tmp_path: Path) -> None:
    """A study of wide images is stopped by Ctrl-C while the last two of four runs train at the same
    time; both save, and the same command then completes it. The runs before them are trained in
    this process, which takes less time than their launches."""
    study = mini(tmp_path, *FEW, *WIDE, TOGETHER)
    folder = study.folder
    prepare_data(study)
    for config, run in study.runs()[:2]:
        assert run_here(config, run.path)[0] == 0
    stop_with_ctrl_c(tmp_path, folder, TOGETHER)
    assert [run.status()["state"] for _, run in study.runs()[2:]] == ["preempted"] * 2
    text, _ = (process := start(tmp_path, "", TOGETHER)).communicate(timeout=240)
    assert process.returncode == 0, text[-3000:]
    check_report(folder)
    before = times(folder)
    assert run_study(study.config, tmp_path) == study.report
    assert times(folder) == before
    check_wide(folder)
    with raises("study.image-size", "data.shapes.size=[16, 40]"):
        check_study_here(mini(tmp_path, *FEW, *WIDE, "data.shapes.size=32"))


def check_wide(folder: Path) -> None:
    """Tokens have scales of height x width, and pictures the shape of the images."""
    manifest = load_manifest(folder / "tokens" / "train")
    assert manifest.tokens is not None and manifest.tokens["length"] == 1 + 2 + 8 + 10
    assert manifest.tokens["patch_nums"] == [1, [1, 2], [2, 4], [2, 5]]
    last = final(RunFolder(folder / "d02-s0"))
    assert len(last["loss_per_scale"]) == 4 and np.isfinite(last["loss_avg"])
    zoom = 96 // 16
    assert Image.open(folder / "report" / "samples.png").size == (
        2 * (40 * zoom + 2) - 2,
        3 * (16 * zoom + 2 + 14) - 2,  # 14 pixels for the name of the class
    )


def check_quality(study: Study) -> None:
    """`study quality` measures the samples of every run, and leaves a second call nothing to do."""
    command = ["study", "quality", *MINI, *FEW, *WIDE, "--runs", str(study.folder.parent)]
    main([*command, "--count", "40"])
    quality = json.loads((study.report / "quality.json").read_text())
    assert quality["count"] == 40 and quality["settings"]["cfg"] == 0
    assert quality["reference"].endswith("val")
    assert [row["run"] for row in quality["runs"] if row["share"] == 1] == [
        "d01-s0",
        "d02-s0",
        "d03-s0",
        "d04-s0",
    ]
    assert 0 < quality["classifier"]["validation"] <= 1
    assert all(0 <= row["accuracy"] <= 1 for row in quality["runs"])
    assert all(row["FD-tok"] > 0 for row in quality["runs"])
    found = (study.folder / "quality").glob("d01-s0-*.npz")
    images = max(found, key=lambda path: path.stat().st_mtime_ns)
    before = images.stat().st_mtime_ns
    main([*command, "--count", "40"])
    assert images.stat().st_mtime_ns == before and (study.report / "quality.png").exists()


@pytest.mark.slow
def test_killed_continued_and_done(tmp_path: Path) -> None:
    """kill -9 while the tokenizer trains and while a model trains, then Ctrl-C; then the study of
    wide images completes, and the quality of its samples is measured."""
    folder = tmp_path / "wide"

    process = start(tmp_path)
    wait_for(folder / "images" / "val" / "manifest.json", process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    process = start(tmp_path)
    wait_for(folder / "d02-s0" / "metrics.jsonl", process)
    process.kill()  # the run itself notices and stops
    process.communicate()

    kept = [folder / "tokenizer" / "tokenizer.safetensors", folder / "d01-s0" / "metrics.jsonl"]
    before = [path.stat().st_mtime_ns for path in kept]
    stop_with_ctrl_c(tmp_path, folder)
    process = start(tmp_path)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text[-3000:]
    assert [path.stat().st_mtime_ns for path in kept] == before
    check_report(folder)
    check_wide(folder)
    check_quality(mini(tmp_path, *FEW, *WIDE))
    check_nothing_is_done_twice(folder)


def stop_with_ctrl_c(runs: Path, folder: Path, *changes: str) -> None:
    """Send SIGINT to the command alone while the largest run trains, which a pause in its steps
    makes sure of."""
    process = start(runs, "0:8:sleep=2", *changes)
    wait_for(folder / "d04-s0" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 85


def check_report(folder: Path) -> None:
    """Every run is in the report, with the hold-out test of the largest and measured samples."""
    report = folder / "report"
    assert "## Quality of the samples" in (report / "report.md").read_text()
    files = "report.md report.html runs.csv fit.json laws.png compute.png residuals.png samples.png"
    for path in (
        *(report / name for name in files.split()),
        folder / "tokenizer" / "reconstructions.png",
        folder / "plan.json",
    ):
        assert path.stat().st_size > 500, path
    records = read_runs_csv(report / "runs.csv")
    assert [r.depth for r in records] == [1, 2, 3, 4]
    assert all(r.state == "complete" and r.eval_samples == 128 for r in records)
    assert all(len(r.curve) == 2 for r in records)
    holdouts = json.loads((report / "fit.json").read_text())["holdouts"]
    assert {h["metric"] for h in holdouts if h["form"] == "power"} == set(METRICS)
    assert all(h["held"] == ["d04-s0"] for h in holdouts)


def check_nothing_is_done_twice(folder: Path) -> None:
    """A complete study is left unchanged, also without its images, tokens and checkpoints; a
    missing picture is drawn again from the remaining files."""
    config, report = mini(folder.parent, *FEW, *WIDE).config, folder / "report"
    before = times(folder)
    assert run_study(config, folder.parent) == report
    assert times(folder) == before
    for name in ("images", "tokens", "d01-s0/checkpoints", "d04-s0/checkpoints"):
        shutil.rmtree(folder / name)
    before = times(folder)
    run_study(config, folder.parent)
    assert times(folder) == before
    (report / "laws.png").unlink()
    run_study(config, folder.parent)
    after = times(folder)
    assert after.keys() == before.keys() and not (folder / "images").exists()
    assert after[report / "samples.png"] == before[report / "samples.png"]
    run_study(config, folder.parent)
    assert times(folder) == after


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "var_scale.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_diverged_size_does_not_stop_the_others_and_a_moved_study_still_samples(
    tmp_path: Path,
) -> None:
    """A size with an absurd learning rate is excluded and the rest is fitted; the folder may
    move."""
    overrides = [
        *MINI,
        "study.depths=[1,2,3,4]",
        "study.overrides={2: {train.base_lr: 1.0e+30, train.clip: 0.0}}",
    ]
    done = call("study", "run", *overrides, "--runs", str(tmp_path / "a"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    (tmp_path / "a").rename(tmp_path / "b")
    study = tmp_path / "b" / "mini"
    gate = json.loads((study / "report" / "fit.json").read_text())["gate"]
    assert [item[:2] for item in gate["excluded"]] == [["d02-s0", "diverged"]]
    before = times(study)
    again = call("study", "run", *overrides, "--runs", str(tmp_path / "b"))
    assert again.returncode == 0 and times(study) == before, again.stdout + again.stderr
    picture = tmp_path / "s.png"
    sample = call("sample", str(study / "d03-s0"), "--out", str(picture), "--per-class", "1")
    assert sample.returncode == 0 and picture.exists(), sample.stderr
    fit = call("fit", str(study))
    assert "d02-s0" in fit.stdout and "(3 points" in fit.stdout, fit.stdout + fit.stderr


@pytest.mark.slow
def test_a_study_without_a_healthy_run_has_a_report_but_no_law(tmp_path: Path) -> None:
    hopeless = ["name=hopeless", "study.depths=[1]", "train.base_lr=1.0e+30", "train.clip=0"]
    hopeless.append("study.quality_samples=4")
    with pytest.raises(UserError) as error:
        run_study(mini(tmp_path, *hopeless).config, tmp_path)
    assert error.value.code == "study.no-healthy-run" and error.value.exit_code == 2
    assert (tmp_path / "hopeless/report/report.md").exists()
    assert not (tmp_path / "hopeless/report/complete.json").exists()


def test_images_of_any_size(tmp_path: Path) -> None:
    """Images of several sizes are resized and cropped to what the tokenizer takes; each training
    image gives several crops."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        with ShardSetWriter(
            tmp_path / split, "image", split, 3, 16, {"name": "photographs"}
        ) as writer:
            for i in range(count):
                side = int(rng.integers(40, 90))
                writer.add_image(
                    png_bytes(rng.integers(0, 256, (side, side + 9, 3)).astype(np.uint8)), i % 3
                )
            writer.finish()
    given = [
        "data.shapes=null",
        f"data.images_train={tmp_path / 'train'}",
        f"data.images_val={tmp_path / 'val'}",
        "data.num_classes=3",
    ]
    study = mini(tmp_path, *given, *FEW, "data.views=2")
    prepare_data(study)
    tokens = [load_manifest(study.folder / "tokens" / split) for split in ("train", "val")]
    assert [(m.num_samples, m.tokens["views"]) for m in tokens if m.tokens] == [(40, 2), (20, 1)]
