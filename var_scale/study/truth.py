"""A study whose data have a known floor: the fitted irreducible loss is compared with it."""

from __future__ import annotations

from collections.abc import Sequence

from var_scale.files import read_json, write_json
from var_scale.progress import say
from var_scale.records.analyse import StudyResult
from var_scale.records.truth import compare_floor
from var_scale.report.theme import look, save
from var_scale.report.truth import truth_figure, truth_section
from var_scale.study.study import Study
from var_scale.study.token_sets import FLOOR_NAME


def truth_sections(study: Study, result: StudyResult, formats: Sequence[str]) -> list[str]:
    """The section of the report as Markdown, with truth.png and truth.json beside it; empty where
    no floor is known or no run is healthy."""
    path = study.folder / FLOOR_NAME
    if not path.exists() or not result.healthy:
        return []
    truths = compare_floor(result.healthy, read_json(path, "floor"))
    with look():
        picture = save(truth_figure(truths, result.healthy), study.report, "truth", formats)
    write_json(study.report / "truth.json", [truth.to_json() for truth in truths])
    for truth in truths:
        fit = truth.fit
        found = f"no law ({fit.reason})"
        if fit.converged:
            low, high = fit.intervals["E"]
            where = "inside" if truth.inside else "outside"
            found = f"fitted E {fit.params['E']:.4f} [{low:.4f}, {high:.4f}], exact is {where}"
        say(f"{truth.name}: exact E {truth.exact:.4f}, {found}")
    return [truth_section(truths, picture.name)]
