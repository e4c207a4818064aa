"""The driver on this machine: runs what is missing of a study, from images to report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from var_scale.config.load import write_config
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.progress import say
from var_scale.study.checks import (
    check_data_settings,
    check_study_here,
    only_process,
    require_folder,
    require_no_jobs,
)
from var_scale.study.data_checks import require_sources
from var_scale.study.plan import plan_table
from var_scale.study.stages import (
    make_report,
    mark_complete,
    measure_samples,
    nothing_to_do,
    prepare_data,
    train_runs,
)
from var_scale.study.study import Study


def run_study(config: Config, runs: Path) -> Path:
    """Run what is missing of a study; returns the folder of its report.

    Ctrl-C (KeyboardInterrupt) lets the run that trains save first.

    Raises:
        UserError: a condition of `check_study_here` does not hold; or no run is healthy, so that
            the report holds no law (code `study.no-healthy-run`).
    """
    study = Study(config, runs)
    if nothing_to_do(study):
        return study.report
    check_study_here(study)
    with only_process(study):
        require_no_jobs(study)
        write_config(config, study.folder / "study.yaml")
        study.keep_rates()
        if not study.ended():
            prepare_data(study)
            plan_table(study, save=True)
            train_runs(study)
        measure_samples(study)
        if not make_report(study).gate.kept:
            raise UserError(
                f"{study.folder}: no run is healthy, so there is no law; the reasons are in "
                f"{study.report / 'report.md'}",
                code="study.no-healthy-run",
            )
        mark_complete(study)
    say(f"done. Report: {study.report / 'report.html'}")
    return study.report


def prepare_study(study: Study) -> None:
    """Make the images, the tokenizer and the tokens of a study, whichever are missing."""
    check_data_settings(study)
    require_sources(study)
    prepare_data(study)


def report_study(study: Study, whole: bool, formats: Sequence[str] = ("png",)) -> None:
    """Write the report again from the run folders, with figures in `formats`.

    Raises:
        UserError: with `whole`, runs that have not ended are missing in it (code
            `study.runs-missing`).
    """
    require_folder(study)
    if whole:
        measure_samples(study)
    make_report(study, formats)
    say(f"report: {study.report / 'report.html'}")
    unfinished = ", ".join(f"{name} ({state})" for name, state in study.unfinished())
    if not unfinished:
        mark_complete(study)
        return
    say(f"these runs have not ended and are missing in the report: {unfinished}")
    if whole:
        raise UserError(
            f"{study.folder}: runs are missing in the report: {unfinished}; run the study again",
            code="study.runs-missing",
        )
