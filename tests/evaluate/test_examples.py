"""Every script of examples/ runs and prints what it should."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.runs import run_here, small_config

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTS = {
    "sample.py": "last scale by d02-s0: 0 of",
    "edit.py": "3 edits",
    "fit_table.py": "power_floor: y = 4.",
    "add_a_depth.py": "d06-s0",
    "kernels_alone.py": "gradient of qkv",
}


def test_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(PRINTS) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert all(name in (EXAMPLES / "README.md").read_text() for name in PRINTS)
    code, folder = run_here(small_config(tmp_path, train={"steps": 2}), tmp_path / "d02-s0")
    assert code == 0
    monkeypatch.chdir(tmp_path)
    for name, words in PRINTS.items():
        arguments = [str(folder.path)] if name in ("sample.py", "edit.py") else []
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert words in capsys.readouterr().out, name
    assert (tmp_path / "example-samples.png").exists() and (tmp_path / "example-edit.png").exists()
