"""Training of tokenizers and models, and checkpoints of the official trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from var_scale.commands.arguments import (
    Commands,
    StudyArguments,
    argument,
    command,
    family,
    folder_path,
    option,
    positive,
)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrain(StudyArguments):
    processes: int = option(
        "one process per GPU; without a GPU, 1 uses all cores", 1, type=positive
    )
    folder: Path | None = option(
        "folder of the tokenizer; default: RUNS/NAME/tokenizer", None, type=folder_path
    )


def tokenizer_train(arguments: TokenizerTrain) -> None:
    """Train the tokenizer of a config on its image shards."""
    from var_scale.study.single import train_tokenizer_of

    train_tokenizer_of(arguments.load(), arguments.runs, arguments.folder, arguments.processes)


@dataclass(frozen=True, kw_only=True)
class Train(StudyArguments):
    folder: Path | None = option("run folder; default: RUNS/STUDY/RUN", None)
    depth: int | None = option("size of the study to train", None)


def train(arguments: Train) -> None:
    """Train one model in a run folder, or continue its training."""
    from var_scale.progress import say
    from var_scale.study.single import find_run, train_run

    config, place = find_run(arguments.load(), arguments.config, arguments.runs, arguments.depth)
    say(train_run(config, arguments.folder or place))


@dataclass(frozen=True, kw_only=True)
class CheckpointExport:
    run: Path = argument("run folder")
    out: Path = argument("file to write, such as ar-ckpt-last.pth")


def checkpoint_export(arguments: CheckpointExport) -> None:
    """Write the newest checkpoint of a run as an ar-ckpt file of the official trainer: weights,
    tokenizer and optimiser."""
    from var_scale.train.official import export_checkpoint

    epoch = export_checkpoint(arguments.run, arguments.out)
    print(f"{arguments.out}: written after {epoch} complete epochs")


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    checkpoint: Path = argument("training checkpoint of the official code, ar-ckpt-*.pth")


@dataclass(frozen=True, kw_only=True)
class CheckpointImport(Train, _Checkpoint):
    """The checkpoint comes before the config: fields of the last base class come first."""


def checkpoint_import(arguments: CheckpointImport) -> None:
    """Create a run folder that continues from an official ar-ckpt file."""
    from var_scale.study.single import find_run
    from var_scale.train.official import import_checkpoint

    config, place = find_run(arguments.load(), arguments.config, arguments.runs, arguments.depth)
    place = arguments.folder or place
    step = import_checkpoint(arguments.checkpoint, config, place)
    print(
        f"{place}: continues from step {step} with `var-scale train` and the same config, "
        "overrides and options"
    )


def add(commands: Commands) -> None:
    """Add these commands."""
    tokenizer = family(commands, "tokenizer", "the multi-scale VQVAE: train")
    command(tokenizer, "train", tokenizer_train, TokenizerTrain)
    command(commands, "train", train, Train)
    checkpoint = family(commands, "checkpoint", "checkpoints of the official trainer")
    command(checkpoint, "export", checkpoint_export, CheckpointExport)
    command(checkpoint, "import", checkpoint_import, CheckpointImport)
