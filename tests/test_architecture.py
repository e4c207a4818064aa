"""The order of the rooms, as the table of docs/explanation/architecture.md lists them: a file
imports only from its own room and from rooms above it in the table, and no files import each other
in a circle. Imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = [
    re.findall(r"`([\w/]+)`", line.split("|")[1])
    for line in (ROOT / "docs" / "explanation" / "architecture.md").read_text().splitlines()
    if line.startswith("| `")
]
BASE, ROOMS = TABLE[0], ["base", *(row[0].rstrip("/") for row in TABLE[1:])]
LONGEST = 400


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package, folder in (
        ("var_scale", ROOT / "var_scale"),
        ("var_kernels", ROOT / "kernels" / "var_kernels"),
        ("var_kernels.bench", ROOT / "kernels" / "bench"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {module for module in found if module in known and module != name}


def room(name: str) -> str:
    """The room of a module of var_scale."""
    first = name.split(".")[1] if "." in name else "base"
    if first == "cli":
        return "commands"
    return "base" if first in BASE else first


MODULES = modules()
GRAPH = {name: imports(name, path, MODULES) for name, path in MODULES.items()}


def test_the_table_lists_every_room() -> None:
    """The page and the folders agree."""
    folders = {path.parent.name for path in (ROOT / "var_scale").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "var_scale").glob("*.py")} - {"__init__", "cli"}
    assert folders == set(ROOMS[1:]) and files == set(BASE)


def test_no_import_points_upwards() -> None:
    """Every arrow goes to the same room or to one above it in the table."""
    wrong = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if name.startswith("var_scale.") and target.startswith("var_scale.")
        if ROOMS.index(room(name)) < ROOMS.index(room(target))
    ]
    assert not wrong, "\n".join(sorted(wrong))
    assert not [
        n for n, t in GRAPH.items() if n.startswith("var_kernels") and "var_scale" in str(t)
    ]


def test_no_import_cycle() -> None:
    """Files can be put into an order in which each imports only from earlier ones."""
    left = {name: set(targets) for name, targets in GRAPH.items()}
    while ready := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in ready}
    assert not left, (
        f"these files import each other in a circle, or import one that does: {sorted(left)}"
    )


def test_no_file_is_too_long() -> None:
    """Files are read from top to bottom."""
    long = {str(p): n for p in MODULES.values() if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long
