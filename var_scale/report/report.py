"""The report of a study: report.md, report.html, runs.csv, fit.json and the pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from var_scale.files import write_json, write_text
from var_scale.records.analyse import StudyResult
from var_scale.records.runs_csv import write_runs_csv
from var_scale.report.law_values import law_values
from var_scale.report.page import html_page
from var_scale.report.plots import write_plots
from var_scale.report.values import Plan, number, span, study_values

NUMERIC = re.compile(
    r"^(n/a|none|[-+±]?\d[\d.,e+-]*( %)?( \S{1,3}( \d+ \S{1,3})?)?( to .*| or more.*)?)?$"
)
"""A number with a unit, an interval, or a duration; also an empty cell."""


def write_report(
    study_dir: Path,
    result: StudyResult,
    facts: Mapping[str, str] | None = None,
    shown: Mapping[str, Path] | None = None,
    plan: Plan | None = None,
    *,
    formats: Sequence[str] = ("png",),
    sections: Sequence[str] = (),
) -> Path:
    """Write the files of STUDY/report/.

    Args:
        facts: further lines of "What was measured", as title and text.
        shown: PNG files that exist already: growth, samples, reconstructions.
        formats: of the pictures that are drawn: png, svg, pdf. PNG is always written.
        sections: further sections as Markdown, after the checklist.

    Returns:
        The path of report.html.
    """
    folder = Path(study_dir) / "report"
    for left_over in folder.glob(".*.tmp"):  # of a report that was killed
        left_over.unlink()
    pictures = write_plots(result, folder, formats) | dict(shown or {})
    write_runs_csv(result.records, folder / "runs.csv")
    write_json(folder / "fit.json", result.to_json())
    name = Path(study_dir).resolve().name
    links = {key: Path(os.path.relpath(path, folder)).as_posix() for key, path in pictures.items()}
    text = markdown(name, result, links, facts or {}, plan, sections)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html_page(text, folder))
    return folder / "report.html"


def markdown(
    name: str,
    result: StudyResult,
    pictures: Mapping[str, str],
    facts: Mapping[str, str],
    plan: Plan | None,
    sections: Sequence[str] = (),
) -> str:
    """The report as Markdown. `pictures` are links relative to the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("var_scale.report", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, which html_page escapes
    )
    environment.filters |= {"number": number, "span": span, "cell": cell}
    environment.globals["table"] = table
    text = environment.get_template("report.md.j2").render(
        name=name,
        pictures=pictures,
        facts=facts,
        sections=sections,
        **study_values(result, plan),
        **law_values(result),
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    # One line per paragraph and list item: the template's line breaks fall in odd places.
    return re.sub(r"(?<=\S)\n(?! *(\n|\||- |$)) *", " ", text).strip() + "\n"


def cell(text: object) -> str:
    """A text that does not end its cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    right = [k > 0 and all(NUMERIC.match(row[k]) for row in cells) for k in range(len(head))]
    align = ["---:" if numbers else "---" for numbers in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, align, *cells])
