"""The table of how often intervals of real training runs hold the truth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools import truth_coverage
from tools.truth_coverage import Row, add, known, markdown, results


def law(name: str, exact: float, floor: float | None, low: float, high: float) -> dict[str, Any]:
    """An entry of truth.json; without a floor, a fit that did not converge."""
    fit = {"params": {"E": floor}, "intervals": {"E": [low, high]}} if floor else None
    given = {"name": name, "exact": exact, "validation": exact - 0.08}
    return given | {"fit": fit or {"params": {}, "intervals": {}}}


def test_reports_become_rows_and_rows_become_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two studies: an interval that holds the loss on the study's tokens but not the exact one, one
    that is too high, no law; and the prediction of the largest size by the surface, not by another
    form. Rows survive the file."""
    monkeypatch.setattr(truth_coverage, "TABLE", tmp_path / "table.csv")
    assert known() == []
    held = {"metric": "loss_avg", "form": "chinchilla", "measured": 2.0}
    for teacher, (low, high) in {1: (1.9, 1.95), 2: (1.7, 1.75)}.items():
        truths = [law("scale 1", 1.8, 1.76, low, high), law("average", 1.9, None, 0, 0)]
        holdouts = [
            {**held, "predicted": 2.02, "low": 1.98, "high": 2.06},
            {**held, "form": "power", "predicted": 3.0, "low": 2.9, "high": 3.1},
        ]
        (tmp_path / "truth.json").write_text(json.dumps(truths))
        (tmp_path / "fit.json").write_text(json.dumps({"holdouts": holdouts}))
        add(list(results(teacher, tmp_path)))
    rows = known()
    assert [row.teacher for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[0] == Row(1, "E of scale 1", 1.8, 1.72, 1.76, 1.9, 1.95)
    assert math.isnan(rows[1].estimate) and math.isnan(rows[1].low)
    table = markdown(rows).splitlines()
    # Without a surface of the smaller sizes, the largest has no prediction.
    (tmp_path / "fit.json").write_text(json.dumps({"holdouts": holdouts[1:]}))
    last = list(results(3, tmp_path))[-1]
    assert last.interval == "average loss of d7" and math.isnan(last.estimate)
    assert table[2] == "| E of scale 1 | 2 | 0 | 1 | 0 | 1 | 0 | +2.33 % | 2.8 % |"
    assert table[3].startswith("| E of average | 2 | 2 | 0 | 0 | 0 | 0 |")
    assert table[4] == "| average loss of d7 | 2 | 0 | 2 | 0 | 0 | n/a | +1.00 % | 4.0 % |"
