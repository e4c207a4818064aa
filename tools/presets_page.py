"""The tables of docs/reference/presets.md, from the first comment of every preset."""

from __future__ import annotations

import re
from pathlib import Path

from var_scale.config.load import config_root
from var_scale.files import replace_between

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "presets.md"
FOLDERS = ("study", "model", "tokenizer", "data", "engine", "cluster")


def page() -> str:
    """The page with one table per folder of configs/."""
    text = PAGE.read_text()
    for folder in FOLDERS:
        files = sorted((config_root() / folder).glob("*.yaml"), key=_order)
        rows = [f"| `{folder}/{path.stem}` | {beginning(path)} |" for path in files]
        table = "\n".join(["| name | content |", "|---|---|", *rows])
        text = replace_between(text, f"<!-- {folder}: begin -->", f"<!-- {folder}: end -->", table)
    return text


def beginning(path: Path) -> str:
    """The comment that a preset begins with, up to the first full stop after its first line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    text = " ".join(lines)
    end = re.compile(r"\.(?:\s|$)").search(text, len(lines[0]) - 1)
    return text[: end.start()] if end else text


def _order(path: Path) -> tuple[str, int, str]:
    """By the letters, number and rest of a name: d8, d16, d36, d36-512."""
    letters, number, rest = re.match(r"(\D*)(\d*)(.*)", path.stem).groups()  # type: ignore[union-attr]
    return letters, int(number or 0), rest
