"""Pages that must stay complete."""

from __future__ import annotations

import re
from pathlib import Path

from var_scale.cli import build_parser
from var_scale.config.schema import Config
from var_scale.study.record import METRICS

DOCS = Path(__file__).parents[1] / "docs"
FLAGS = [
    "data_path", "local_debug", "exp_name", "vfast", "tfast", "depth", "ini", "hd", "aln", "alng", "fp16", "tblr", "tlr", "twd", "twde",
    "tclip", "ls", "bs", "ac", "ep", "wp", "wp0", "wpe", "sche", "opt", "afuse", "saln", "anorm", "fuse", "pn", "patch_size",
    "mid_reso", "hflip", "workers", "pg", "pg0", "pgwp", "tf32", "seed", "same_seed_for_all_ranks", "local_out_dir_path",
]  # fmt: skip
"""what a user may set of the official train.py"""


def test_every_official_flag_has_its_place() -> None:
    """No flag is missing; every key that the page names exists; every field and command too."""
    text = (DOCS / "from-official.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `--")]
    assert [re.findall(r"`--(\w+)`", row[0])[0] for row in rows] == FLAGS
    for row in rows:
        for key in re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", row[1]):
            section, name = key.split(".")
            assert name in Config.model_fields[section].annotation.model_fields, key  # type: ignore[union-attr]
        assert row[1].strip() or row[2].strip(), row
    assert all(f"`{metric}`" in text for metric in METRICS)
    parser = build_parser()
    for command in re.findall(r"`var-scale ((?:[a-z]+ ?)+)", text):
        words = command.split()
        names = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        assert words[0] in names, command  # type: ignore[operator]
