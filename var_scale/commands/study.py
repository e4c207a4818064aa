"""Studies, tables of runs, laws."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.commands.arguments import (
    Commands,
    command,
    config_argument,
    family,
    load_config,
    mapping,
    number_in,
    runs_argument,
    whole_numbers,
)
from var_scale.errors import UserError

if TYPE_CHECKING:
    pass


def study_plan(args: argparse.Namespace) -> None:
    """Print the runs of a study with parameters, exact FLOPs, memory and expected time; nothing is written."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.plan import plan_table

    plan_table(Study(load_config(args), args.runs))


def study_run(args: argparse.Namespace) -> None:
    """Run a study from images to report, on this machine or as SLURM jobs; run again to continue."""
    if args.on == "slurm":
        from var_scale.cluster.slurm import submit

        submit(load_config(args), args.runs, args.dry_run)
        return
    from var_scale.cluster.pipeline import Study, run_study
    from var_scale.cluster.plan import plan_table

    if args.dry_run:
        plan_table(Study(load_config(args), args.runs))
    else:
        run_study(load_config(args), args.runs)


def study_prepare(args: argparse.Namespace) -> None:
    """Make the images, the tokenizer and the tokens of a study, whichever are missing."""
    from var_scale.cluster.pipeline import Study, prepare_data, require_sources

    study = Study(load_config(args), args.runs)
    require_sources(study)
    prepare_data(study)


def study_status(args: argparse.Namespace) -> None:
    """One table: state, step, loss, speed, remaining time, restarts, job and reason of every run."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.status import status_table, watch

    (watch if args.watch else status_table)(Study(load_config(args), args.runs))


def study_next(args: argparse.Namespace) -> None:
    """Say which runs to make next within a budget: the narrowest exponent for the cost, or the best model."""
    from var_scale.cluster.next import next_runs
    from var_scale.cluster.pipeline import Study

    next_runs(Study(load_config(args), args.runs), args.hours, args.metric, args.depths or ())


def study_quality(args: argparse.Namespace) -> None:
    """Samples of every healthy run against validation images: distance (FID, or FD-tok) against loss and size, with fits and a picture."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.quality import study_quality
    from var_scale.model.sampling import Settings

    study = Study(load_config(args), args.runs)
    settings = Settings(args.cfg, study.spec.top_k, study.spec.top_p)
    study_quality(study, args.count, args.extractor, args.reference, settings, args.batch)


def study_stop(args: argparse.Namespace) -> None:
    """Stop runs of a study: those that train save first, queued jobs are taken back. Running the study again goes on."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.slurm import stop

    stop(Study(load_config(args), args.runs), args.only or ())


def study_retry(args: argparse.Namespace) -> None:
    """Try runs that failed or diverged again from their last checkpoint, given by their folders; on SLURM they are submitted."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.slurm import retry, submit
    from var_scale.config.load import load
    from var_scale.progress import say

    folder = args.run[0].resolve().parent
    if any(run.resolve().parent != folder for run in args.run) or not (folder / "study.yaml").exists():
        raise UserError(f"{args.run[0]}: give folders of runs of one study, such as runs/tiny/d02-s0")
    config = load(str(folder / "study.yaml"))
    retry(Study(config, folder.parent), [run.resolve().name for run in args.run])
    if (folder / "slurm" / "jobs.json").exists():
        submit(config, folder.parent)
    else:
        say(f"tried again by: var-scale study run {folder / 'study.yaml'} --runs {folder.parent}")


def study_report(args: argparse.Namespace) -> None:
    """Gate, fit, sample and write the report again from the run folders."""
    from var_scale.cluster.pipeline import ENDED, Study, make_report
    from var_scale.progress import say

    study = Study(load_config(args), args.runs)
    make_report(study)
    say(f"report: {study.report / 'report.html'}")
    if missing := [f"{config.name} ({run.status()['state']})" for config, run in study.runs() if run.status()["state"] not in ENDED]:
        say(f"it is without {', '.join(missing)}")
        if args.whole:
            raise UserError(f"{study.folder}: runs are missing in the report; run the study again")
    else:
        study.mark_complete()


def records(args: argparse.Namespace) -> None:
    """One table of runs: from run and study folders, wandb (files, or wandb:ENTITY/PROJECT), the official trainer's folders, any CSV."""
    from var_scale.progress import say
    from var_scale.study.gate import gate
    from var_scale.study.ingest import read_all
    from var_scale.study.record import METRICS, write_runs_csv

    found = read_all(args.sources, args.map, args.train_samples)
    write_runs_csv(found, args.out)
    measured = [name for name in METRICS if any(math.isfinite(record.metric(name)) for record in found)] or METRICS
    excluded = {id(item.record): item for item in gate(found, metrics=measured).excluded}
    for record in found:
        item = excluded.get(id(record))
        say(f"{record.name}: d{record.depth}, {record.images:,} images, loss_avg {record.loss_avg:.4f}, loss_last {record.loss_last:.4f}"
            + (f"  [{item.code}: {item.text}]" if item else ""))  # fmt: skip
    if args.map:
        taken = [text for name, text in ASSUMED.items() if name not in args.map and not (name == "images" and "tokens" in args.map)]
        say(f"assumed of mapped tables: parameters of the paper's ladder (C = 64 d); {'; '.join(taken)}")
    say(f"{args.out}: {len(found)} runs; `var-scale fit {args.out} --x params_paper --y loss_avg` fits those that pass the gate")


ASSUMED = {"images": "no images or tokens, so no compute", "final_lr_fraction": "learning rates annealed",
           "data_hash": "all on the same data", "seed": "seed 0", "seconds": "no times"}  # fmt: skip


def fit(args: argparse.Namespace) -> None:
    """Fit a law to a table: columns by name, one row a run. Exit code 1 where there is no law, with the reason."""
    from var_scale.study.table import fit_table

    law = fit_table(args.table, args.x, args.y, args.form, args.floor, args.json, not args.keep_outliers, args.seed)
    if args.compare:
        from dataclasses import asdict

        from var_scale.files import read_json, write_json
        from var_scale.progress import say
        from var_scale.study.compare import compare
        from var_scale.study.laws import plain

        other = fit_table(args.compare, args.x, args.y, args.form, args.floor, None, not args.keep_outliers, args.seed)
        result = compare(law, other)
        say(result.sentence(str(args.table), str(args.compare)))
        if args.json:
            write_json(args.json, read_json(args.json) | {"compare": {"table": str(args.compare), **plain(asdict(result))}})


def add(commands: Commands) -> None:
    """Add these commands."""
    study = family(commands, "study", "a ladder of models and its laws: plan, run, status, stop, retry, report, next, quality")
    for name, function in (("plan", study_plan), ("run", study_run), ("status", study_status), ("stop", study_stop),
                           ("next", study_next), ("quality", study_quality), ("report", study_report),
                           ("prepare", study_prepare)):  # fmt: skip
        sub = command(study, name, function)
        config_argument(sub)
        runs_argument(sub)
        if name == "run":
            sub.add_argument("--on", choices=("local", "slurm"), default="local", help="this machine, or jobs of SLURM")
            sub.add_argument("--dry-run", action="store_true", help="show the plan, and on SLURM the scripts; nothing is written")
        elif name == "status":
            sub.add_argument("--watch", action="store_true", help="show it again every five seconds until all runs have ended")
        elif name == "stop":
            sub.add_argument("--only", type=lambda text: text.split(","), metavar="RUN,...", help="runs such as d02-s0; default all")
        elif name == "next":
            sub.add_argument("--hours", type=number_in(float, 1e-9), required=True, help="device-hours to spend (CPU: of the machine)")
            sub.add_argument("--metric", choices=("loss_last", "loss_avg", "err_last", "err_avg"), default="loss_avg", help="whose law")
            sub.add_argument("--depths", type=whole_numbers, default=None, help="sizes such as 6,8; default its own and larger")
        elif name == "quality":
            sub.add_argument("--count", type=number_in(int, 2), default=2000, help="images of every run")
            sub.add_argument("--extractor", default=None, help="as of `evaluate samples`; default the study's tokenizer, FD-tok")
            sub.add_argument("--reference", type=Path, default=None, help="images or statistics; default the study's validation images")
            sub.add_argument("--cfg", type=number_in(float, 0), default=0.0, help="guidance; 0, the model's own distribution")
            sub.add_argument("--batch", type=number_in(int, 1), default=64, help="images at a time")
        elif name == "report":
            sub.add_argument("--whole", action="store_true", help="fail where a run has not ended")
    sub = command(study, "retry", study_retry)
    sub.add_argument("run", type=Path, nargs="+", help="folder of a run, such as runs/tiny/d02-s0")

    sub = command(commands, "records", records)
    sub.add_argument("sources", nargs="+", help="run, study, wandb or official output folders, CSVs, wandb:ENTITY/PROJECT")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="table to write")
    sub.add_argument("--map", type=mapping, default=None, metavar="FIELD=COLUMN,...",
                     help="of CSVs of others, such as depth=layers,loss_avg=val")  # fmt: skip
    sub.add_argument("--train-samples", type=number_in(int, 1), default=1281167, help="training images of official runs")

    sub = command(commands, "fit", fit)
    sub.add_argument("table", type=Path, help="CSV file, or a study's folder such as runs/tiny (its report/runs.csv)")
    sub.add_argument("--x", default="params_paper",
                     help="column of the size, for chinchilla two with a comma (N,D), for repeated three (N,D,U); of a study: "
                     "params_paper (the paper's N), params_total, flops_exact, ...")  # fmt: skip
    sub.add_argument("--y", default="loss_avg", help="column of the loss; of a study: loss_last, loss_avg, err_last, err_avg")
    sub.add_argument("--form", choices=("power", "power_floor", "broken_power", "chinchilla", "repeated"), default="power",
                     help="power: floor + a x^-alpha; power_floor: the floor fitted; broken_power: two exponents about a break; "
                     "chinchilla: E + A N^-alpha + B D^-beta; repeated: the same where only U of the D tokens are different")  # fmt: skip
    sub.add_argument("--json", type=Path, default=None, metavar="FILE", help="write form, params, intervals, status, ...")
    sub.add_argument("--compare", type=Path, default=None, metavar="TABLE", help="a second table: test whether both follow one power law")
    sub.add_argument("--keep-outliers", action="store_true", help="leave no point out that a law of the others makes impossible")
    sub.add_argument("--seed", type=number_in(int, 0), default=0, help="of the bootstrap")
    sub.add_argument("--floor", type=number_in(float, 0), default=0.0, help="assumed irreducible part E of power and broken_power")
