"""The `var-scale` command: one thin function a subcommand; heavy imports inside the functions."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from var_scale.errors import Preempted, UserError
from var_scale.run_folder import EXIT_REQUEUE

if TYPE_CHECKING:
    from var_scale.config.schema import Config

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file or preset, such as study/tiny")
    text = "any changes, such as train.batch_size=64 or engine=fsdp"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=_folder, default=Path("runs"), metavar="DIR", help="folder of all studies")


def _labels(parser: argparse.ArgumentParser) -> None:
    text = "text file with the name of class N (from 0) in line N + 1"
    parser.add_argument("--class-names", type=Path, default=None, metavar="FILE", help=text)
    parser.add_argument("--label-key", default=None, metavar="FIELD", help="in tars without .cls, the field of each .json with the class")


def _folder(text: str) -> Path:
    """A folder, there or not."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; name a folder on disk")
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return path


def _picture(text: str) -> Path:
    """A PNG file to write."""
    if (path := Path(text)).suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return path


def _number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """A reader of finite numbers from low to high."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (low <= number <= high and math.isfinite(number)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} " + (f"from {low} to {high}" if high < math.inf else f"from {low} up"))
        return number

    return read


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,3,7") from None


def _mapping(text: str) -> dict[str, str]:
    """FIELD=COLUMN with commas between."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as depth=layers,loss_avg=val_loss")
    return dict(pairs)


class _Parser(argparse.ArgumentParser):
    """A wrong argument is one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default in (None, False, []) or "default" in (action.help or "")
        return action.help if quiet else super()._get_help_string(action)


def _load(args: argparse.Namespace) -> Config:
    from var_scale.config.load import load

    return load(args.config, args.overrides)


def doctor(args: argparse.Namespace) -> None:
    """What this machine has, and what each missing piece costs."""
    from var_scale.cluster.doctor import doctor

    doctor()


def data_synth(args: argparse.Namespace) -> None:
    """Generate the embedded set of a config (data.leaves or data.grammar) as WebDataset shards."""
    from var_scale.cluster.pipeline import Study, make_grammar, make_leaves

    config = _load(args)
    if config.data.grammar:
        make_grammar(Study(config, args.runs).with_files())
        return
    if config.data.leaves is None:
        raise UserError(f"{args.config}: has neither data.leaves nor data.grammar; include data/leaves32 or data/grammar")
    make_leaves(config if config.data.images_train else Study(config, args.runs).with_files())


def data_shard(args: argparse.Namespace) -> None:
    """Images (class folders, ImageNet's train and val, a CSV of path,label, or tars) to globally shuffled WebDataset shards."""
    from var_scale.data.convert import shard_images
    from var_scale.progress import say

    done = shard_images(args.source, args.out, args.split, args.seed, args.samples_per_shard, args.max_broken, args.processes,
                        args.label_key, _lines(args.class_names))  # fmt: skip
    for split, manifest in done.items():
        say(f"{split}: {manifest.num_samples:,} images of {manifest.num_classes} classes in {len(manifest.shards)} shards ({args.out})")


def _lines(path: Path | None) -> list[str] | None:
    """Of a text file; None without one."""
    return path.read_text().splitlines() if path else None


def data_index(args: argparse.Namespace) -> None:
    """Adopt WebDataset tars made by others, of a folder or at URLs: check every member, write the index and manifest.json."""
    from var_scale.data.index_urls import index_urls
    from var_scale.data.shards import index_folder
    from var_scale.progress import say

    names = _lines(args.class_names)
    if "://" in args.folder:
        if args.out is None:
            raise UserError("--out: name a folder for the index and manifest of tars at URLs")
        folder, manifest = args.out, index_urls(args.folder, args.out, args.split, args.num_classes, names, args.label_key)
    elif args.out:
        raise UserError("--out: is for tars at URLs; the index of a folder lies in the folder")
    else:
        manifest = index_folder(folder := Path(args.folder), kind="image", split=args.split, num_classes=args.num_classes,
                                class_names=names, label_key=args.label_key)  # fmt: skip
    say(f"{folder}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards indexed")


def data_verify(args: argparse.Namespace) -> None:
    """Check sizes, checksums and every sample of the shards against manifest.json."""
    from var_scale.data.shards import verify_folder
    from var_scale.progress import say

    problems = verify_folder(args.folder, args.drop_bad)
    for problem in problems:
        say(problem)
    if problems and args.drop_bad:
        say(f"{args.folder}: the manifest holds the sound shards alone now; runs that began with the others refuse it")
    elif problems:
        raise UserError(f"{args.folder}: {len(problems)} problem(s); make the named shards again, or leave them out with --drop-bad")
    say(f"{args.folder}: all shards are whole")


def data_info(args: argparse.Namespace) -> None:
    """Counts, classes, sizes, provenance."""
    from var_scale.data.shards import describe_folder
    from var_scale.progress import say

    for key, value in describe_folder(args.folder).items():
        say(f"{key:24} {value}")
    if args.sheet:
        from var_scale.evaluate.samples import contact_sheet

        contact_sheet(args.folder, args.sheet)
        say(f"{'sheet':24} {args.sheet}")


def data_tokenize(args: argparse.Namespace) -> None:
    """Image shards to token shards with the config's tokenizer."""
    from var_scale.cluster.pipeline import Study, tokenize_stage

    config = _load(args)
    tokenize_stage(Study(config, args.runs).with_files() if config.study else _with_tokenizer(config, args.runs))


def _with_tokenizer(config: Config, runs: Path) -> Config:
    """Without tokenizer.weights: the tokenizer that `tokenizer train` made of this config, if it did."""
    from var_scale.model.load import tokenizer_file
    from var_scale.progress import say

    found = tokenizer_file(runs / config.name / "tokenizer")
    if config.tokenizer.weights or not found.exists():
        return config
    say(f"tokenizer: {found}")
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"weights": str(found)})})


def tokenizer_train(args: argparse.Namespace) -> None:
    """Train the config's tokenizer on its image shards."""
    from var_scale.cluster.pipeline import Study, make_leaves, train_tokenizer_stage

    config = _load(args)
    if config.tokenizer.weights:
        raise UserError(f"tokenizer.weights: {config.tokenizer.weights} is given, so there is nothing to train; set it to null")
    if config.study:
        config = Study(config, args.runs).with_files()
    if config.data.leaves and config.data.images_train:
        make_leaves(config)
    train_tokenizer_stage(config, args.folder or args.runs / config.name / "tokenizer", args.processes)


def _one_run(args: argparse.Namespace) -> tuple[Config, Path]:
    """Config and folder of one run: of the size `--depth` of a study, with the study's data and tokenizer, or of a config by itself."""
    from var_scale.cluster.pipeline import Study, check_config, require_inputs
    from var_scale.config.load import run_config

    config = _load(args)
    if config.study:
        study = Study(config, args.runs)
        if args.depth not in study.spec.depths:
            given = "" if args.depth is None else args.depth
            raise UserError(f"--depth {given}: name a size of this study, one of {', '.join(map(str, study.spec.depths))}")
        config = run_config(study.with_files(), args.depth, config.train.seed)
        folder = args.folder or study.folder / config.name
    else:
        name = config.name if config.name != "run" else Path(args.config).stem  # model/d16 is the run d16
        folder, config = args.folder or args.runs / "single" / name, _with_tokenizer(config, args.runs)
    require_inputs(config)
    check_config(config)
    return config, folder


def train(args: argparse.Namespace) -> None:
    """Train one model in a run folder, or continue it."""
    from var_scale.cluster.local import train_here
    from var_scale.progress import say
    from var_scale.run_folder import RunFolder
    from var_scale.train.loop import create_run

    config, folder = _one_run(args)
    run = create_run(config, folder)
    if run.status()["state"] == "complete":
        say(f"{folder}: this run is complete, nothing to do")
        return
    train_here(config, RunFolder(folder), f"train {config.name}")
    final = [row for row in run.read_metrics() if row["kind"] == "eval"][-1]
    say(f"{folder}: validation loss {final['loss_avg']:.4f} (all scales), {final['loss_last']:.4f} (last)")


def study_plan(args: argparse.Namespace) -> None:
    """Print the runs of a study with parameters, exact FLOPs, memory and expected time; nothing is written."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.plan import plan_table

    plan_table(Study(_load(args), args.runs))


def study_run(args: argparse.Namespace) -> None:
    """Run a study from images to report, on this machine or as SLURM jobs; run again to continue."""
    if args.on == "slurm":
        from var_scale.cluster.slurm import submit

        submit(_load(args), args.runs, args.dry_run)
        return
    from var_scale.cluster.pipeline import Study, run_study
    from var_scale.cluster.plan import plan_table

    if args.dry_run:
        plan_table(Study(_load(args), args.runs))
    else:
        run_study(_load(args), args.runs)


def study_prepare(args: argparse.Namespace) -> None:
    """Make the images, the tokenizer and the tokens of a study, whichever are missing."""
    from var_scale.cluster.pipeline import Study, prepare_data, require_sources

    study = Study(_load(args), args.runs)
    require_sources(study)
    prepare_data(study)


def study_status(args: argparse.Namespace) -> None:
    """One table: state, step, loss, speed, remaining time, restarts, job and reason of every run."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.status import status_table, watch

    (watch if args.watch else status_table)(Study(_load(args), args.runs))


def study_next(args: argparse.Namespace) -> None:
    """Say which runs to make next within a budget: the narrowest exponent for the cost, or the best model."""
    from var_scale.cluster.next import next_runs
    from var_scale.cluster.pipeline import Study

    next_runs(Study(_load(args), args.runs), args.hours, args.metric, args.depths or ())


def study_stop(args: argparse.Namespace) -> None:
    """Stop runs of a study: those that train save first, queued jobs are taken back. Running the study again goes on."""
    from var_scale.cluster.pipeline import Study
    from var_scale.cluster.slurm import stop

    stop(Study(_load(args), args.runs), args.only or ())


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

    study = Study(_load(args), args.runs)
    make_report(study)
    say(f"report: {study.report / 'report.html'}")
    if missing := [f"{config.name} ({run.status()['state']})" for config, run in study.runs() if run.status()["state"] not in ENDED]:
        say(f"it is without {', '.join(missing)}")
        if args.whole:
            raise UserError(f"{study.folder}: runs are missing in the report; run the study again")
    else:
        study.mark_complete()


def sample(args: argparse.Namespace) -> None:
    """Sample images from a trained run into one grid picture."""
    import torch

    from var_scale.evaluate.samples import class_names, load_run, sample_images, write_grid
    from var_scale.progress import say

    var, num_classes = load_run(args.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    classes = args.classes or list(range(min(10, num_classes)))
    if wrong := [c for c in classes if not 0 <= c < num_classes]:
        raise UserError(f"--classes {wrong[0]}: this model has classes 0 to {num_classes - 1}")
    images = sample_images(var, classes, args.per_class, seed=args.seed, cfg=args.cfg, top_k=args.top_k, top_p=args.top_p,
                           more_smooth=args.more_smooth)  # fmt: skip
    write_grid(images, args.out, zoom=args.zoom, names=class_names(args.run, classes))
    say(f"{len(classes)} classes x {args.per_class} images: {args.out}")


def checkpoint_export(args: argparse.Namespace) -> None:
    """Write a run's newest checkpoint as the official trainer's ar-ckpt file: weights, tokenizer, optimiser."""
    from var_scale.train.official import export_checkpoint

    epoch = export_checkpoint(args.run, args.out)
    print(f"{args.out}: written, {epoch} whole epochs done")


def checkpoint_import(args: argparse.Namespace) -> None:
    """Make a run folder that goes on where an official ar-ckpt file ends."""
    from var_scale.train.official import import_checkpoint

    config, folder = _one_run(args)
    step = import_checkpoint(args.checkpoint, config, folder)
    print(f"{folder}: goes on from step {step}; `var-scale train` with the same config, overrides and options")


def bench_kernels(args: argparse.Namespace) -> None:
    """Time the fused operators against eager PyTorch, torch.compile and what else is installed."""
    from var_kernels.bench.run import run

    try:
        run(args.operators, args.shapes, args.out, args.tune)
    except ValueError as error:
        raise UserError(str(error)) from None


def bench_step(args: argparse.Namespace) -> None:
    """Time a block and a training step with the fused operators and without."""
    from var_scale.train.bench import bench_step

    bench_step(args.configs, args.batch, args.set, args.out)


def bench_official(args: argparse.Namespace) -> None:
    """Compare a training step with the official trainer's, from a checkout of its code, on this device."""
    from var_scale.cluster.bench import bench_official

    bench_official(_load(args), args.checkout, args.steps, args.warmup, args.compile_official, args.out)


def bench_data(args: argparse.Namespace) -> None:
    """Time how fast one core makes training images of JPEGs, and reads tokens."""
    from var_scale.data.bench import bench_data

    bench_data(args.out)


def bench_train(args: argparse.Namespace) -> None:
    """Time a training step of a config on its engine's processes, and where its time goes; or with --dry-run what each rank would hold."""
    from var_scale.cluster.bench import bench_train, show_dry_run

    config = _load(args)
    if config.study:
        from var_scale.config.load import run_config

        if args.depth is None:
            raise UserError(f"--depth: name a size of this study, such as {config.study.depths[0]}")
        config = run_config(config, args.depth, config.train.seed)
    if args.world and not args.dry_run:
        raise UserError("--world: is for --dry-run; a real step runs on engine.processes")
    if args.dry_run:
        show_dry_run(config, args.world or 1)
    else:
        bench_train(config, args.steps, args.warmup, args.out, args.trace)


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
    say(f"{args.out}: {len(found)} runs; `var-scale fit {args.out} --x params_paper --y loss_avg` fits those that pass the gate")


def fit(args: argparse.Namespace) -> None:
    """Fit a law to a table: columns by name, one row a run. Exit code 1 where there is no law, with the reason."""
    from var_scale.study.table import fit_table

    law = fit_table(args.table, args.x, args.y, args.form, args.floor, args.json, not args.keep_outliers, args.seed)
    if args.compare:
        from var_scale.progress import say
        from var_scale.study.compare import compare

        other = fit_table(args.compare, args.x, args.y, args.form, args.floor, None, not args.keep_outliers, args.seed)
        say(compare(law, other).sentence(str(args.table), str(args.compare)))


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = _Parser(prog="var-scale", description="Scaling studies of VAR image models.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(group: argparse._SubParsersAction, name: str, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        sub = group.add_parser(name, help=text, description=text, formatter_class=_Help)
        sub.set_defaults(function=function)
        return sub

    def family(name: str, text: str) -> argparse._SubParsersAction:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=lambda args: sub.print_help())
        return sub.add_subparsers(metavar="COMMAND")

    command(commands, "doctor", doctor)

    data = family("data", "image and token shards: synth, shard, index, verify, info, tokenize")
    for name, function in (("synth", data_synth), ("tokenize", data_tokenize)):
        sub = command(data, name, function)
        _config(sub)
        _runs(sub)
    sub = command(data, "shard", data_shard)
    sub.add_argument("source", type=Path, help="folder of class folders or of train and val with such, .csv with path,label, or tars")
    sub.add_argument("out", type=Path, help="folder for the shards")
    sub.add_argument("--split", default=None, help="name of the split, where SOURCE is one; default train")
    sub.add_argument("--seed", type=int, default=0, help="key of the shuffle")
    sub.add_argument("--samples-per-shard", type=_number(int, 1), default=1024, help="images a shard")
    sub.add_argument("--max-broken", type=float, default=0.01, help="share of images that may be unreadable before the job stops")
    sub.add_argument("--processes", type=_number(int, 1), default=None, help="workers; default one a core")
    _labels(sub)
    for name, function in (("index", data_index), ("verify", data_verify), ("info", data_info)):
        sub = command(data, name, function)
        if name == "index":
            sub.add_argument("folder", help="folder of the shards, or URLs such as https://host/set/{00000..00099}.tar, which stay there")
            sub.add_argument("--out", type=_folder, default=None, help="of URLs: folder for index and manifest, read like shards")
            sub.add_argument("--split", default="train", help="name of the split")
            sub.add_argument("--num-classes", type=_number(int, 1), default=None, help="classes; default one more than the largest label")
            _labels(sub)
        else:
            sub.add_argument("folder", type=_folder, help="folder of the shards")
        if name == "verify":
            sub.add_argument("--drop-bad", action="store_true", help="write the manifest again without the shards that have a problem")
        if name == "info":
            sub.add_argument("--sheet", type=_picture, default=None, metavar="FILE.png", help="write a contact sheet: a row a class")

    sub = command(family("tokenizer", "the multi-scale VQVAE: train"), "train", tokenizer_train)
    _config(sub)
    _runs(sub)
    sub.add_argument("--processes", type=_number(int, 1), default=1, help="processes, one a GPU; without a GPU 1 uses all cores")
    sub.add_argument("--folder", type=_folder, default=None, help="folder of the tokenizer; default RUNS/NAME/tokenizer")

    sub = command(commands, "train", train)
    _config(sub)
    _runs(sub)
    sub.add_argument("--folder", type=Path, default=None, help="run folder; default RUNS/STUDY/RUN")
    sub.add_argument("--depth", type=int, default=None, help="size of a study to train")

    study = family("study", "a ladder of models and its laws: plan, run, status, stop, retry, report, next")
    for name, function in (("plan", study_plan), ("run", study_run), ("status", study_status), ("stop", study_stop),
                           ("next", study_next), ("report", study_report), ("prepare", study_prepare)):  # fmt: skip
        sub = command(study, name, function)
        _config(sub)
        _runs(sub)
        if name == "run":
            sub.add_argument("--on", choices=("local", "slurm"), default="local", help="this machine, or jobs of SLURM")
            sub.add_argument("--dry-run", action="store_true", help="show the plan, and on SLURM the scripts; nothing is written")
        elif name == "status":
            sub.add_argument("--watch", action="store_true", help="show it again every five seconds until all runs have ended")
        elif name == "stop":
            sub.add_argument("--only", type=lambda text: text.split(","), metavar="RUN,...", help="these runs, such as d02-s0; default all")
        elif name == "next":
            sub.add_argument("--hours", type=_number(float, 1e-9), required=True, help="device-hours to spend (CPUs: hours of the machine)")
            sub.add_argument("--metric", choices=("loss_last", "loss_avg", "err_last", "err_avg"), default="loss_avg", help="law to narrow")
            sub.add_argument("--depths", type=_numbers, default=None, help="sizes to choose from, such as 6,8; default its own and larger")
        elif name == "report":
            sub.add_argument("--whole", action="store_true", help="fail where a run has not ended")
    sub = command(study, "retry", study_retry)
    sub.add_argument("run", type=Path, nargs="+", help="folder of a run, such as runs/tiny/d02-s0")

    sub = command(commands, "sample", sample)
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("--out", type=_picture, default=Path("samples.png"), metavar="FILE.png", help="picture to write")
    sub.add_argument("--classes", type=_numbers, default=None, help="class numbers, such as 0,3,7; default the first ten")
    sub.add_argument("--per-class", type=_number(int, 1), default=6, help="images a class")
    sub.add_argument("--seed", type=_number(int, 0, 2**62), default=0, help="seed of the first class; class c has seed + c")
    sub.add_argument("--cfg", type=_number(float, 0), default=1.5, help="classifier-free guidance; 0: none")
    sub.add_argument("--top-k", type=_number(int, 0), default=0, help="keep the k likeliest tokens; 0: all")
    sub.add_argument("--top-p", type=_number(float, 0, 1), default=0.0, help="keep the likeliest tokens of this mass; 0: all")
    sub.add_argument("--more-smooth", action="store_true", help="Gumbel-softmax embeddings: smoother pictures")
    sub.add_argument("--zoom", type=_number(int, 1), default=1, help="enlarge the picture")

    checkpoint = family("checkpoint", "the official trainer's checkpoints")
    sub = command(checkpoint, "export", checkpoint_export)
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("out", type=Path, help="file to write, such as ar-ckpt-last.pth")
    sub = command(checkpoint, "import", checkpoint_import)
    sub.add_argument("checkpoint", type=Path, help="official training checkpoint, ar-ckpt-*.pth")
    _config(sub)
    _runs(sub)
    sub.add_argument("--folder", type=Path, default=None, help="run folder to make; default as `var-scale train`")
    sub.add_argument("--depth", type=int, default=None, help="size of a study")

    bench = family("bench", "timings of this machine: kernels, data, step, train, official")
    sub = command(bench, "data", bench_data)
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results")
    sub = command(bench, "kernels", bench_kernels)
    sub.add_argument("--operators", nargs="*", default=[], metavar="NAME", help="such as block_attention; default all")
    sub.add_argument("--shapes", nargs="*", default=[], metavar="START", help="how names of shapes begin, such as d16; default all")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results, and a roofline plot beside them")
    sub.add_argument("--tune", action="store_true", help="decide first which form of the MLP runs at each width, and keep that")

    sub = command(bench, "step", bench_step)
    sub.add_argument("configs", nargs="+", help="config files or presets, such as model/d16 model/d30")
    sub.add_argument("--batch", type=_number(int, 1), default=32, help="samples a step")
    sub.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to every config")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the results")

    sub = command(bench, "official", bench_official)
    sub.add_argument("checkout", type=Path, help="folder of the official code, FoundationVision/VAR")
    _config(sub)
    sub.add_argument("--steps", type=_number(int, 1), default=10, help="steps to time")
    sub.add_argument("--warmup", type=_number(int, 1), default=3, help="steps before them")
    sub.add_argument("--compile-official", action="store_true", help="torch.compile the official transformer (its tfast)")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the result")

    sub = command(bench, "train", bench_train)
    _config(sub)
    sub.add_argument("--depth", type=_number(int, 1), default=None, help="size of a study")
    sub.add_argument("--steps", type=_number(int, 1), default=10, help="steps to time")
    sub.add_argument("--warmup", type=_number(int, 1), default=3, help="steps before them")
    sub.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="write the result")
    sub.add_argument("--trace", type=Path, default=None, metavar="FILE.json", help="write a profiler trace of one step (chrome://tracing)")
    sub.add_argument("--dry-run", action="store_true", help="no step: build the config for --world ranks and print what each would hold")
    sub.add_argument("--world", type=_number(int, 1), default=None, help="ranks of the dry run; default 1")

    sub = command(commands, "records", records)
    sub.add_argument("sources", nargs="+", help="run, study, wandb or official output folders, CSVs, wandb:ENTITY/PROJECT")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="table to write")
    sub.add_argument("--map", type=_mapping, default=None, metavar="FIELD=COLUMN,...",
                     help="of CSVs of others, such as depth=layers,loss_avg=val")  # fmt: skip
    sub.add_argument("--train-samples", type=_number(int, 1), default=1281167, help="training images of official runs")

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
    sub.add_argument("--seed", type=_number(int, 0), default=0, help="of the bootstrap")
    sub.add_argument("--floor", type=_number(float, 0), default=0.0, help="assumed irreducible part E of power and broken_power")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one line and exit code 2."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides, rest = [*args.overrides, *rest], []  # key=value may also stand after options
    if rest:
        parser.error(f"unknown arguments: {' '.join(text for text in rest if text.startswith('-')) or ' '.join(rest)}")
    if args.version:
        from var_scale import __version__

        print(__version__)
        return
    if not hasattr(args, "function"):
        parser.print_help()
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as Ctrl-C: files are finished or removed, runs are saved
        signal.signal(number, signal.default_int_handler)
    try:
        args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(EXIT_REQUEUE if isinstance(stopped, Preempted) else EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path that is a file where a folder is needed, a folder in place of a file, ...
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
