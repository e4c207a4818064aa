"""A law of one table, or of two tables that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from var_scale.errors import UserError
from var_scale.files import read_json, write_json
from var_scale.laws.compare import Comparison, compare
from var_scale.laws.forms import Form
from var_scale.laws.law import plain
from var_scale.progress import say
from var_scale.records.columns import N, of_n
from var_scale.records.table import PLAIN, FitOptions, fit_table


def fit_tables(
    tables: Sequence[Path],
    x: str,
    y: str,
    form: Form,
    *,
    floor: float,
    out: Path | None,
    outliers: bool,
    seed: int,
    options: FitOptions = PLAIN,
) -> None:
    """Fit a law to the first table and, where there is a second, test whether both follow one law.

    Args: see `fit_table`; `out` gets the law of the first table and the comparison.
    """
    _require_one_count(tables, x)
    first = fit_table(tables[0], x, y, form, floor, out, outliers, seed, options)
    if len(tables) == 1:
        return
    second = fit_table(tables[1], x, y, form, floor, None, outliers, seed, options)
    result = compare(first, second)
    say(comparison_sentence(result, str(tables[0]), str(tables[1]), form))
    if out:
        compared = {"table": str(tables[1]), **plain(asdict(result))}
        write_json(out, read_json(out) | {"compare": compared})


def _require_one_count(tables: Sequence[Path], x: str) -> None:
    """Refuse to compare laws of N that count other parameters.

    Raises:
        UserError: code `records.counts-differ`.
    """
    counts = [of_n(table) for table in tables] if N in x.split(",") else []
    if len(set(counts)) > 1:
        raise UserError(
            f"{tables[0]} and {tables[1]}: N is {counts[0]} in the first and {counts[1]} in the "
            f"second; give --x {counts[0]} or --x {counts[1]}",
            code="records.counts-differ",
        )


def comparison_sentence(result: Comparison, one: str, two: str, form: Form = "power") -> str:
    """The comparison of two laws of a form, named `one` and `two`."""
    weaker = "the exponents are equal" if form == "power" else "they differ by a factor only"
    change = " to ".join(f"{100 * (end - 1):+.2f} %" for end in (result.low, result.high))
    return (
        f"{two} over {one}: {100 * (result.ratio - 1):+.2f} % (95 % {change}) at the same size; "
        f"p = {result.p_same:.3g} that both follow one law, p = {result.p_exponent:.3g} that "
        f"{weaker} ({result.freedom:.3g} degrees of freedom)"
    )
