"""The options of `var-scale fit`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.raises import raises
from tests.synthetic_study import ladder
from var_scale.cli import main
from var_scale.records.runs_csv import write_runs_csv
from var_scale.records.table import FitOptions, fit_table


def test_options_reach_the_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A surface with weights, objective and rows held out, through the command line."""
    n, d = np.repeat(np.geomspace(5e7, 5e9, 4), 4), np.tile(np.geomspace(1e9, 1e11, 4), 4)
    noise = np.exp(1e-3 * np.random.default_rng(2).standard_normal(16))
    y = (1.8 + 400 * n**-0.3 + 900 * d**-0.3) * noise
    lines = [f"{a},{b},{c},{1 + k % 3}" for k, (a, b, c) in enumerate(zip(n, d, y, strict=True))]
    table, out = tmp_path / "t.csv", tmp_path / "law.json"
    table.write_text("N,D,loss,w\n" + "\n".join(lines))
    call = f"fit {table} --x N,D --y loss --form tied --weights w --objective mse --hold-out size"
    main([*call.split(), "--json", str(out)])
    law, text = json.loads(out.read_text()), capsys.readouterr().out
    assert law["audit"]["minimise"] == "mse" and law["audit"]["scheme"] == "sizes"
    assert law["row_weights"] == pytest.approx([(1 + k % 3) / 1.9375 for k in range(16)])
    assert abs(law["params"]["alpha"] - 0.3) < 0.03
    held = law["hold_out"]
    assert [row["row"] for row in held["rows"]] == [f"line {k}" for k in range(14, 18)]
    assert held["rows"][0]["measured"] == y[12] and abs(held["rows"][0]["relative_error"]) < 0.02
    assert text.count("held out: line") == 4 and held["fit"]["params"] != law["params"]


def test_no_intervals_and_rising_through_the_command(tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "law.json"
    n, d = np.repeat([1e7, 1e8, 1e9], 2), np.array([1e9, 1e10, 1e9, 1e11, 1e10, 1e11])
    y = 1.8 + 400 * n**-0.3 + 900 * d**-0.3
    rows = [f"{a},{b},{c}" for a, b, c in zip(n, d, y, strict=True)]
    table.write_text("N,D,loss\n" + "\n".join(rows))
    call = f"fit {table} --x N,D --y loss --form tied --json {out}".split()
    with pytest.raises(SystemExit, match="1"):
        main(call)
    assert json.loads(out.read_text())["code"] == "too_few"
    main([*call, "--no-intervals"])
    assert json.loads(out.read_text())["params"]["alpha"] == pytest.approx(0.3, rel=1e-3)
    table.write_text("C,N\n" + "\n".join(f"{c},{2 * c**0.5}" for c in (1e18, 1e19, 1e20, 1e21)))
    main(f"fit {table} --x C --y N --rising --json {out}".split())
    assert json.loads(out.read_text())["params"]["exponent"] == pytest.approx(0.5)


def test_weights_of_runs_and_of_unknown_columns_are_refused(tmp_path: Path) -> None:
    write_runs_csv(ladder(), tmp_path / "runs.csv")
    (tmp_path / "t.csv").write_text("n,loss,w\n1,3,1\n2,2,0\n3,1.5,1\n")
    for name, column, code in (
        ("runs.csv", "seed", "records.fit-weights"),
        ("t.csv", "v", "records.table-column"),
        ("t.csv", "w", "records.table-cell"),
    ):
        x, y = ("params_paper", "loss_avg") if name == "runs.csv" else ("n", "loss")
        with raises(code, column):
            fit_table(tmp_path / name, x, y, "power", 0.0, options=FitOptions(weights=column))
