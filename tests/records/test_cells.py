"""Slips in tables that people write: each is one line that names the line and the column."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.raises import raises
from tests.synthetic_study import ladder
from var_scale.records.columns import read_columns
from var_scale.records.runs_csv import read_runs_csv, write_runs_csv
from var_scale.records.sources import read_all, read_records

MAPPING = {"depth": "layers", "loss_avg": "val", "seed": "sd", "images": "im"}


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ("4,3.2,0,12.5", ["line 2", "im", "12.5"]),
        ("4,3.2,0,0", ["line 2", "im", "'0'"]),
        ("4,3.2,99999999999999999999,9", ["line 2", "sd", "9999"]),
        ("4,3.2,9223372036854775808,9", ["line 2", "sd"]),
        ("4,3.2,1e999,9", ["line 2", "sd"]),
        ("4,-3.2,0,9", ["line 2", "val", "-3.2"]),
        ("4,0,0,9", ["line 2", "val", "'0'"]),
        ("4,-inf,0,9", ["line 2", "val", "-inf"]),
        ("1_0,3.2,0,9", ["line 2", "layers", "1_0"]),
        ("\u0664,3.2,0,9", ["line 2", "layers"]),
        ("4,3.2,0,9,7", ["line 2", "more cells", "im", "'7'"]),
        ('4,3.2,0,9\n6,"3.1,0,9\n8,3.0,0,9', ["line 3", "quote"]),
        ("4,3.2,0," + "9" * 401, ["line 2", "im"]),
    ],
)
def test_slips_in_a_mapped_table(cells: str, names: list[str], tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"layers,val,sd,im\n{cells}\n", encoding="utf-8")
    with raises("file.csv-quote" if "quote" in names else "records.table-cell", table, *names):
        read_records(str(table), MAPPING)


def test_whole_numbers_stay_exact(tmp_path: Path) -> None:
    """The largest one keeps every digit; pandas writes whole numbers of a column with gaps as
    12.0; an empty seed is 0; a quoted cell may hold a line break."""
    table = tmp_path / "t.csv"
    table.write_text(
        'layers,val,sd,im\n4.0,3.2,9223372036854775807,12.0\n4,3.1,,1e3\n"6\n",nan,0,9\n'
    )
    runs = read_records(str(table), MAPPING)
    assert [(run.depth, run.seed, run.images) for run in runs] == [
        (4, 2**63 - 1, 12),
        (4, 0, 1000),
        (6, 0, 9),
    ]


def test_other_slips_of_mapped_tables(tmp_path: Path) -> None:
    """A separator, a column twice, an error in percent, and tokens of less than one image."""
    table = tmp_path / "t.csv"
    table.write_text("layers;val;sd;im\n4;3.2;0;9\n")
    with raises("records.table-separator", table, ";"):
        read_records(str(table), MAPPING)
    table.write_text("layers;val;sd\n4;3,2;0\n")  # commas in numbers
    with raises("records.table-separator", table, ";"):
        read_records(str(table), MAPPING)
    table.write_text("layers,val,n\n4,3.2,one\n4,3.1,one\n")
    with raises("records.run-twice", table, "one", "twice"):
        read_all([str(table)], {"depth": "layers", "loss_avg": "val", "name": "n"})
    table.write_text("layers,val,val\n4,3.2,3.1\n")
    with raises("records.table-column", table, "val"):
        read_records(str(table), {"depth": "layers", "loss_avg": "val"})
    table.write_text("layers,val,err,tok\n4,3.2,45,68000\n")
    with raises("records.table-cell", "line 2", "err", "45"):
        read_records(str(table), {"depth": "layers", "loss_avg": "val", "err_avg": "err"})
    table.write_text("layers,val,tok\n4,3.2,100\n")
    with raises("records.table-cell", "line 2", "tok", "100"):
        read_records(str(table), {"depth": "layers", "loss_avg": "val", "tokens": "tok"})


@pytest.mark.parametrize("cell", ["x" * 400_000, "9" * 400_000, "1" * 401])
def test_long_cells_are_cut_in_messages(cell: str, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"n,y\n{cell},2\n")
    with pytest.raises(Exception, match="line 2") as error:
        read_columns(table, ["n"], "y")
    assert len(str(error.value)) < 300 + len(str(table)) and cell[:60] in str(error.value)
    write_runs_csv(ladder((2,)), table)
    table.write_text(table.read_text().replace(",100000,", f",{cell},", 1))
    with pytest.raises(Exception, match="images") as error:
        read_runs_csv(table)
    assert len(str(error.value)) < 300 + len(str(table)) and cell[:60] in str(error.value)
    table.write_text(f"{cell},z\n1,2\n")
    with pytest.raises(Exception, match="columns") as error:
        read_columns(table, ["n"], "y")
    assert len(str(error.value)) < 300 + len(str(table))
