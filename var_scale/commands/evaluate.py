"""`evaluate`: how good a model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_scale.commands.arguments import (
    Commands,
    DeviceArguments,
    ModelArguments,
    argument,
    command,
    family,
    option,
    positive,
)


@dataclass(frozen=True, kw_only=True)
class _JsonOutput:
    json: Path | None = option("write the result", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class EvaluateLoss(ModelArguments, _JsonOutput):
    tokens: Path | None = option(
        "token shards; default: those of the run's config", None, metavar="FOLDER"
    )
    label_dropout: bool = option("drop a tenth of the labels, as the official code does", False)
    batch: int = option("samples at a time", 64, type=positive)


def evaluate_loss(arguments: EvaluateLoss) -> None:
    """Measure validation loss and error, in total and per scale, over a whole split of token
    shards."""
    from var_scale.evaluate.loss import validation
    from var_scale.evaluate.score import validation_tokens

    source = arguments.load()
    folder = arguments.tokens or validation_tokens(arguments.model)
    _show(validation(source, folder, arguments.batch, arguments.label_dropout), arguments.json)


def _show(found: dict[str, Any], out: Path | None) -> None:
    """Print one line per value, without the parts of the images, and write all to `out`."""
    from var_scale.files import flat, write_json
    from var_scale.progress import say

    for name, value in flat(found).items():
        if name.endswith("_blocks"):
            continue
        text = f"{value:.5g}" if isinstance(value, float) else value
        if isinstance(value, list):
            text = " ".join(f"{item:.4f}" for item in value)
        say(f"{name:16} {text}")
    if out:
        write_json(out, found)


@dataclass(frozen=True, kw_only=True)
class _Extractor(DeviceArguments):
    extractor: str = option(
        "network whose features are compared: tok:MODEL (FD-tok), or Inception from script:FILE.pt "
        "or fidelity:FILE.pth"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateStats(_Extractor):
    images: Path = argument(".npz file, folder of PNGs or JPEGs, or image shards")
    out: Path = argument("file to write, .npz")


def evaluate_stats(arguments: EvaluateStats) -> None:
    """Save the statistics of images (.npz, folder of PNGs or JPEGs, or image shards) as one .npz
    file in ADM's form, for use as a reference."""
    from var_scale.evaluate.score import write_statistics
    from var_scale.evaluate.source import choose_device
    from var_scale.progress import say

    device = choose_device(arguments.device)
    say(write_statistics(arguments.images, arguments.out, arguments.extractor, device))


@dataclass(frozen=True, kw_only=True)
class EvaluateSamples(_Extractor, _JsonOutput):
    samples: Path = argument(".npz file, folder of PNGs, or image shards")
    reference: Path = option(
        "images, or statistics: written by `evaluate stats`, ADM's VIRTUAL_*.npz, or MAR's mu and "
        "sigma"
    )


def evaluate_samples(arguments: EvaluateSamples) -> None:
    """Compare samples with a reference: FID, sFID, IS, precision and recall, as far as the features
    of the extractor allow."""
    from var_scale.evaluate.score import score_samples
    from var_scale.evaluate.source import choose_device

    device = choose_device(arguments.device)
    found = score_samples(arguments.samples, arguments.reference, arguments.extractor, device)
    _show(found, arguments.json)


def add(commands: Commands) -> None:
    """Add these commands."""
    group = family(commands, "evaluate", "how good a model is: loss, samples, stats")
    command(group, "loss", evaluate_loss, EvaluateLoss)
    command(group, "samples", evaluate_samples, EvaluateSamples)
    command(group, "stats", evaluate_stats, EvaluateStats)
