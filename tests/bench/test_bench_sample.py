"""The comparison with an official checkout, which is here a folder of that form with our own
model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from var_scale.bench.sample import bench_sample
from var_scale.errors import UserError


def checkout(folder: Path, text: str) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text(text)
    (folder / "models" / "var.py").touch()
    return folder


@pytest.mark.slow
def test_both_sides_make_the_same_pictures(tmp_path: Path) -> None:
    text = (
        "from var_scale.model import build_vae_var as b\nprint('noise')\n"
        "def build_vae_var(**k):\n    return b(**k)\n"
    )
    rows = bench_sample(
        checkout(tmp_path / "c", text), 1, [1], ["fp32"], 0, 2, "cpu", tmp_path / "rows.json"
    )
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    (row,) = rows
    assert row["largest_difference"] < 1e-3 and [
        len(seconds) for seconds in row["seconds"].values()
    ] == [2, 2]
    ours, theirs = row["seconds"]["ours"], row["seconds"]["official"]
    assert row["ratio"] == pytest.approx(sum(b / a for a, b in zip(ours, theirs, strict=True)) / 2)


@pytest.mark.slow
def test_a_side_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"official gave no result: ImportError: .*flash"):
        bench_sample(
            checkout(tmp_path / "c", "raise ImportError('no flash')"),
            1,
            [1],
            ["fp32"],
            0,
            1,
            "cpu",
            None,
        )
    with pytest.raises(UserError, match=r"models/var.py"):
        bench_sample(tmp_path, 1, [1], ["fp32"], 0, 1, "cpu", None)
