"""`study`: a ladder of models and its laws. `records`, `fit`: tables of runs, laws of any table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.commands.arguments import (
    Commands,
    StudyArguments,
    argument,
    command,
    family,
    mapping,
    number_in,
    option,
    positive,
    whole_numbers,
)

if TYPE_CHECKING:
    from var_scale.laws.forms import Form
    from var_scale.laws.hold_out import Along
    from var_scale.laws.surface_objective import ObjectiveName


def study_plan(arguments: StudyArguments) -> None:
    """Print the runs of a study with parameters, exact FLOPs, memory and expected time. Writes no
    files."""
    from var_scale.study.plan import plan_table

    plan_table(arguments.study())


@dataclass(frozen=True, kw_only=True)
class StudyRun(StudyArguments):
    on: str = option("this machine, or SLURM jobs", "local", choices=("local", "slurm"))
    dry_run: bool = option("show the plan, and with SLURM the scripts; write no files", False)


def study_run(arguments: StudyRun) -> None:
    """Run a study from images to report, on this machine or as SLURM jobs. The same command
    continues a study that was stopped."""
    if arguments.on == "slurm":
        from var_scale.study.submit import submit

        submit(arguments.load(), arguments.runs, arguments.dry_run)
    elif arguments.dry_run:
        study_plan(arguments)
    else:
        from var_scale.study.run import run_study

        run_study(arguments.load(), arguments.runs)


def study_prepare(arguments: StudyArguments) -> None:
    """Generate the images, train the tokenizer and write the tokens of a study, whichever are
    missing."""
    from var_scale.study.run import prepare_study

    prepare_study(arguments.study())


@dataclass(frozen=True, kw_only=True)
class StudyStatus(StudyArguments):
    watch: bool = option("repeat every five seconds until all runs have ended", False)


def study_status(arguments: StudyStatus) -> None:
    """Print one table: state, step, loss, speed, remaining time, restarts, job and reason of every
    run."""
    from var_scale.study.status import status_table, watch

    (watch if arguments.watch else status_table)(arguments.study())


@dataclass(frozen=True, kw_only=True)
class StudyNext(StudyArguments):
    hours: float = option(
        "device-hours to spend; on CPUs, hours of the machine", type=number_in(float, 1e-9)
    )
    metric: str = option(
        "metric whose law is used",
        "loss_avg",
        choices=("loss_last", "loss_avg", "err_last", "err_avg"),
    )
    depths: Sequence[int] = option(
        "sizes to consider, such as 6,8; default: those of the study and larger ones",
        (),
        type=whole_numbers,
    )


def study_next(arguments: StudyNext) -> None:
    """Recommend the next runs within a budget: those that narrow the exponent most, and the best
    model."""
    from var_scale.study.advice import next_runs

    next_runs(arguments.study(), arguments.hours, arguments.metric, arguments.depths)


@dataclass(frozen=True, kw_only=True)
class StudyQuality(StudyArguments):
    count: int = option("images sampled from every run", 2000, type=number_in(int, 2))
    extractor: str | None = option("as in `evaluate samples`; default: the study's tokenizer", None)
    reference: Path | None = option("images or statistics; default: the validation images", None)
    cfg: float = option("guidance; 0: the model's own distribution", 0.0, type=number_in(float, 0))
    batch: int = option("images sampled at a time", 64, type=positive)


def study_quality(arguments: StudyQuality) -> None:
    """Compare samples of every healthy run with validation images: Frechet distance (FID or FD-tok)
    against loss and size, with fits and a plot."""
    from var_scale.model.sampling import Settings
    from var_scale.study.sample_quality import study_quality

    study = arguments.study()
    study_quality(
        study,
        arguments.count,
        arguments.extractor,
        arguments.reference,
        Settings(arguments.cfg, study.spec.top_k, study.spec.top_p),
        arguments.batch,
    )


@dataclass(frozen=True, kw_only=True)
class StudyStop(StudyArguments):
    only: Sequence[str] = option(
        "runs to stop, such as d02-s0; default: all",
        (),
        type=lambda text: text.split(","),
        metavar="RUN,...",
    )


def study_stop(arguments: StudyStop) -> None:
    """Stop runs of a study: running ones save first, queued jobs are canceled. `study run`
    continues the study."""
    from var_scale.study.submit import stop

    stop(arguments.study(), arguments.only)


@dataclass(frozen=True, kw_only=True)
class StudyRetry:
    run: Sequence[Path] = argument("folders of runs, such as runs/tiny/d02-s0", nargs="+")


def study_retry(arguments: StudyRetry) -> None:
    """Retry runs that failed or diverged, from their last checkpoints. Runs of a study on SLURM are
    submitted."""
    from var_scale.study.submit import retry_folders

    retry_folders(arguments.run)


@dataclass(frozen=True, kw_only=True)
class StudyReport(StudyArguments):
    whole: bool = option("fail if a run has not ended", False)
    formats: Sequence[str] = option(
        "formats of the figures; PNG is always written",
        ("png",),
        nargs="+",
        choices=("png", "svg", "pdf"),
    )


def study_report(arguments: StudyReport) -> None:
    """Gate, fit, sample and rewrite the report from the run folders."""
    from var_scale.study.run import report_study

    report_study(arguments.study(), arguments.whole, arguments.formats)


@dataclass(frozen=True, kw_only=True)
class Records:
    sources: Sequence[str] = argument(
        "folders of runs, studies or the official trainer, CSV files, or wandb:ENTITY/PROJECT",
        nargs="+",
        type=expanduser,
    )
    out: Path = option("table to write", metavar="FILE.csv")
    map: dict[str, str] | None = option(
        "columns of foreign CSV files, such as depth=layers,loss_avg=val",
        None,
        type=mapping,
        metavar="FIELD=COLUMN,...",
    )
    train_samples: int = option("training images of official runs", 1281167, type=positive)
    train_values: bool = option(
        "take training numbers: of the official console, which has no others, and of mapped CSV "
        "files; the table marks these runs",
        False,
    )


def records(arguments: Records) -> None:
    """Collect runs in one table: from folders of runs and studies, a wandb server
    (wandb:ENTITY/PROJECT), folders of the official trainer, and any CSV file."""
    from var_scale.progress import say
    from var_scale.records.collect import collect

    lines = collect(
        arguments.sources,
        arguments.out,
        arguments.map,
        arguments.train_samples,
        arguments.train_values,
    )
    for line in lines:
        say(line)


@dataclass(frozen=True, kw_only=True)
class Fit:
    table: Path = argument("CSV file, or a study's folder such as runs/tiny")
    x: str = option(
        "column of the size; two columns for chinchilla and tied (N,D), three for repeated "
        "(N,D,U); in a study: N (as study.count counts it), params_paper, params_total, "
        "flops_exact, ...",
        "N",
    )
    y: str = option(
        "column of the loss, in a study loss_last, loss_avg, err_last, err_avg", "loss_avg"
    )
    form: Form = option(
        "power: floor + a x^-alpha; power_floor: the same with a fitted floor; broken_power: two "
        "exponents and a break; chinchilla: E + A N^-alpha + B D^-beta; tied: the same with beta = "
        "alpha; repeated: the same where only U of the D tokens are unique",
        "power",
        choices=("power", "power_floor", "broken_power", "chinchilla", "tied", "repeated"),
    )
    json: Path | None = option("write form, params, intervals, status, ...", None, metavar="FILE")
    compare: Path | None = option(
        "second table, to test whether one power law fits both", None, metavar="TABLE"
    )
    keep_outliers: bool = option("keep points that contradict the law of the others", False)
    seed: int = option("seed of the bootstrap", 0, type=number_in(int, 0))
    floor: float = option(
        "assumed irreducible loss E of power and broken_power", 0.0, type=number_in(float, 0)
    )
    weights: str = option(
        "column of weights of the rows, such as 1 / variance; not for broken_power",
        "",
        metavar="COLUMN",
    )
    objective: ObjectiveName = option(
        "what the fit of a surface minimises: Huber's loss of ln y, Huber's loss of y, or the "
        "squares of y",
        "huber_log",
        choices=("huber_log", "huber", "mse"),
    )
    delta: float = option(
        "Huber's threshold, on ln y or in the unit of y", 1e-3, type=number_in(float, 1e-12)
    )
    rising: bool = option("the law rises with x, as the best size with compute; form power", False)
    no_intervals: bool = option(
        "only the estimate: a surface then needs one run more than it has parameters instead of "
        "nine",
        False,
    )
    hold_out: Along | None = option(
        "first predict the rows of the largest size, or of the longest training of a surface, from "
        "the others",
        None,
        choices=("size", "length"),
    )


def fit(arguments: Fit) -> None:
    """Fit a law to a table with one row per run. Exits with code 1 and the reason if there is no
    law."""
    from var_scale.records.compare_tables import fit_tables
    from var_scale.records.table import FitOptions

    fit_tables(
        [arguments.table, *([arguments.compare] if arguments.compare else [])],
        arguments.x,
        arguments.y,
        arguments.form,
        floor=arguments.floor,
        out=arguments.json,
        outliers=not arguments.keep_outliers,
        seed=arguments.seed,
        options=FitOptions(
            arguments.weights,
            arguments.objective,
            arguments.delta,
            arguments.rising,
            not arguments.no_intervals,
            arguments.hold_out,
        ),
    )


def add(commands: Commands) -> None:
    """Add these commands."""
    study = family(
        commands,
        "study",
        "a ladder of models and its laws: plan, run, status, stop, retry, report, next, quality",
    )
    command(study, "plan", study_plan, StudyArguments)
    command(study, "run", study_run, StudyRun)
    command(study, "status", study_status, StudyStatus)
    command(study, "stop", study_stop, StudyStop)
    command(study, "next", study_next, StudyNext)
    command(study, "quality", study_quality, StudyQuality)
    command(study, "report", study_report, StudyReport)
    command(study, "prepare", study_prepare, StudyArguments)
    command(study, "retry", study_retry, StudyRetry)
    command(commands, "records", records, Records)
    command(commands, "fit", fit, Fit)
