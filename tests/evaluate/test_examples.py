"""Every script of examples/ runs and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.runs import run, small_config

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {"sample.py": "last scale by d02-s0: 0 of", "edit.py": "3 edits", "fit_table.py": "power_floor: y = 4.", "add_a_depth.py": "d06-s0",
        "kernels_alone.py": "gradient of qkv"}  # fmt: skip


def test_examples(tmp_path: Path) -> None:
    assert sorted(SAYS) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert all(name in (EXAMPLES / "README.md").read_text() for name in SAYS)
    code, folder = run(small_config(tmp_path, train={"steps": 2}), tmp_path / "d02-s0")
    assert code == 0
    for name, words in SAYS.items():
        arguments = [str(folder.path)] if name in ("sample.py", "edit.py") else []
        done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0 and words in done.stdout, (name, done.stdout, done.stderr)
    assert (tmp_path / "example-samples.png").exists() and (tmp_path / "example-edit.png").exists()
