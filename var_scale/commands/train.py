"""Training of tokenizers and models, official training checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.commands.arguments import (
    Commands,
    command,
    config_argument,
    family,
    folder,
    load_config,
    number_in,
    runs_argument,
    with_tokenizer,
)
from var_scale.errors import UserError

if TYPE_CHECKING:
    from var_scale.config.schema import Config


def tokenizer_train(args: argparse.Namespace) -> None:
    """Train the config's tokenizer on its image shards."""
    from var_scale.cluster.pipeline import Study, make_leaves, train_tokenizer_stage

    config = load_config(args)
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

    config = load_config(args)
    if config.study:
        study = Study(config, args.runs)
        if args.depth not in study.spec.depths:
            given = "" if args.depth is None else args.depth
            raise UserError(f"--depth {given}: name a size of this study, one of {', '.join(map(str, study.spec.depths))}")
        config = run_config(study.with_files(), args.depth, config.train.seed)
        folder = args.folder or study.folder / config.name
    else:
        name = config.name if config.name != "run" else Path(args.config).stem  # model/d16 is the run d16
        folder, config = args.folder or args.runs / "single" / name, with_tokenizer(config, args.runs)
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


def add(commands: Commands) -> None:
    """Add these commands."""
    sub = command(family(commands, "tokenizer", "the multi-scale VQVAE: train"), "train", tokenizer_train)
    config_argument(sub)
    runs_argument(sub)
    sub.add_argument("--processes", type=number_in(int, 1), default=1, help="processes, one a GPU; without a GPU 1 uses all cores")
    sub.add_argument("--folder", type=folder, default=None, help="folder of the tokenizer; default RUNS/NAME/tokenizer")

    sub = command(commands, "train", train)
    config_argument(sub)
    runs_argument(sub)
    sub.add_argument("--folder", type=Path, default=None, help="run folder; default RUNS/STUDY/RUN")
    sub.add_argument("--depth", type=int, default=None, help="size of a study to train")

    checkpoint = family(commands, "checkpoint", "the official trainer's checkpoints")
    sub = command(checkpoint, "export", checkpoint_export)
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("out", type=Path, help="file to write, such as ar-ckpt-last.pth")
    sub = command(checkpoint, "import", checkpoint_import)
    sub.add_argument("checkpoint", type=Path, help="official training checkpoint, ar-ckpt-*.pth")
    config_argument(sub)
    runs_argument(sub)
    sub.add_argument("--folder", type=Path, default=None, help="run folder to make; default as `var-scale train`")
    sub.add_argument("--depth", type=int, default=None, help="size of a study")
