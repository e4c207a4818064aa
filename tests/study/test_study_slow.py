"""The embedded study as a user runs it, and a study that is killed at random moments."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.study.mini import MINI
from var_scale.data.manifest import load_manifest
from var_scale.run_folder import RunFolder
from var_scale.train.checkpoint import checkpoints


def command(runs: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "var_scale.cli", "study", "run", *arguments, "--runs", str(runs)]


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_tiny_study_gives_a_law(tmp_path: Path) -> None:
    """Every run is kept, the loss falls with size, the largest is predicted, and its samples show
    their classes."""
    done = subprocess.run(
        command(tmp_path, "study/tiny"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = tmp_path / "tiny" / "report"
    fit = json.loads((report / "fit.json").read_text())
    assert len(fit["gate"]["kept"]) == 12 and fit["gate"]["excluded"] == []
    for law in fit["fits"]:
        if law["form"] == "power":
            assert (
                law["status"] == "converged"
                and law["r"] < -0.95
                and law["intervals"]["alpha"][0] > 0
            ), law
    for held in fit["holdouts"]:
        if held["form"] == "power_floor" and held["metric"] == "loss_avg":
            assert held["inside"] and abs(held["relative_error"]) < 0.04, held
            assert held["width_fraction"] < 2, held  # the test could have failed
    assert json.loads((tmp_path / "tiny/tokenizer/tokenizer.json").read_text())["psnr_db"] > 22
    quality = json.loads((report / "quality.json").read_text())
    shown = [row["accuracy"] for row in quality["runs"] if row["share"] == 1]
    assert quality["classifier"]["validation"] > 0.95 and shown[-1] > 0.8
    assert shown[0] < shown[2] < shown[4]


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on kills: images, tokens, weights, moments and losses."""
    found: dict[str, object] = {
        f"{kind}/{split}": load_manifest(folder / kind / split).digest
        for kind in ("images", "tokens")
        for split in ("train", "val")
    }
    for path in sorted(folder.glob("d*-s*")):
        run = RunFolder(path)
        found[path.name] = checkpoints(run.checkpoints)[-1].state["files"]
        found[f"{path.name} evals"] = [
            (row["step"], row["loss_avg"]) for row in run.read_metrics() if row["kind"] == "eval"
        ]
    return found


def whole_rows(study: Path) -> dict[tuple[str, int], float]:
    """Losses of the rows that cover two steps, the `log.every` of these runs. A run that stops
    because its study was killed may split a row."""
    rows = {path.name: RunFolder(path).read_metrics() for path in sorted(study.glob("d0*"))}
    return {
        (name, row["step"]): row["loss"]
        for name in rows
        for row in rows[name]
        if row["kind"] == "train" and row["steps"] == 2
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("engine", "kills", "longest"),
    [
        pytest.param("single", 3, 12, marks=pytest.mark.slow),
        pytest.param("zero1", 8, 25, marks=pytest.mark.nightly),
    ],
)
def test_killed_at_random_moments(engine: str, kills: int, longest: float, tmp_path: Path) -> None:
    """kill -9 at most `longest` seconds after every start, of the study alone or with all its
    children: the results are bit for bit those of an undisturbed study."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    rng = random.Random(seed)
    arguments = [
        *MINI,
        f"engine={engine}",
        "train.steps=120",
        "train.checkpoint_seconds=0.2",
        "study.depths=[1,2,3]",
        f"study.parallel={2 if engine == 'single' else 1}",
    ]
    assert (
        subprocess.run(
            command(tmp_path / "calm", *arguments), stdout=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )
    for _ in range(kills):
        study = psutil.Popen(
            command(tmp_path / "wild", *arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(2, longest))
        family = [
            study,
            *(study.children(recursive=True) if study.is_running() and rng.random() < 0.5 else []),
        ]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        study.wait()
    last = subprocess.run(
        command(tmp_path / "wild", *arguments), capture_output=True, text=True, check=False
    )
    assert last.returncode == 0, last.stdout[-3000:]
    assert outcome(tmp_path / "wild" / "mini") == outcome(tmp_path / "calm" / "mini"), (
        f"seed {seed}"
    )
    wild, calm = whole_rows(tmp_path / "wild" / "mini"), whole_rows(tmp_path / "calm" / "mini")
    assert wild.items() <= calm.items() and len(wild) > 0.8 * len(calm), f"seed {seed}"
