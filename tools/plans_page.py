"""Writes docs/reference/plans.md: the plans of the studies of the paper's kind."""

from __future__ import annotations

import re
from pathlib import Path

from var_scale.config.load import find_config, load
from var_scale.study.plan import COLUMNS, cells_of, device_hours, make_plan, time_on_many
from var_scale.study.study import Study

STUDIES = ("study/var_paper", "study/var_512", "study/isoflop")
PAGE = """# Plans

What the studies of the paper's kind cost, as `var-scale study plan STUDY` prints it: exact FLOPs,
memory with estimated activations, and times for the peak on NVIDIA's data sheet at an ASSUMED share
of 40 % (`study.mfu`). Nothing here was measured. The nodes of each size are in the study's
`overrides`, its recipe is in `configs/model/`. `make docs` writes this page (tools/plans_page.py).
"""


def page() -> str:
    """The text of docs/reference/plans.md."""
    return "\n".join([PAGE, *map(section, STUDIES)])


def section(name: str) -> str:
    """The plan of one study as a table, below the comments at the top of its file."""
    study, lines = Study(load(name), Path("runs")), find_config(name).read_text().splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("# "))
    plan = make_plan(study)
    total = time_on_many(study, device_hours(plan.rows))
    return "\n".join(
        [
            f"## {name}\n\n{comment}\n",
            f"| {' | '.join(COLUMNS)} | recipe |",
            f"|{'---|' * len(COLUMNS)}---|",
            *(f"| {' | '.join([*cells_of(r), recipe(study, r.depth)])} |" for r in plan.rows),
            f"\nA{total[1:]}.\n",
        ]
    )


def recipe(study: Study, depth: int) -> str:
    """Where the recipe of a size comes from, as the first line of its preset states."""
    text = find_config(str(study.spec.preset).format(depth=depth)).read_text()
    found = re.search(r"Recipe: (\w+)", text)
    assert found, f"model/d{depth}: its preset states no recipe"
    return found.group(1)
