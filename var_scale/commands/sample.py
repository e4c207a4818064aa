"""`sample` and `edit`: images from a trained model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_scale.commands.arguments import (
    Commands,
    ModelArguments,
    argument,
    command,
    number_in,
    option,
    picture_file,
    positive,
)

if TYPE_CHECKING:
    from var_scale.model.sampling import Settings


def per_scale(
    kind: Callable[[str], Any], low: float, high: float = math.inf
) -> Callable[[str], Any]:
    """A parser of one number, or of one number per scale separated by commas."""
    read = number_in(kind, low, high)
    return lambda text: tuple(map(read, text.split(","))) if "," in text else read(text)


def part(text: str) -> tuple[int, int]:
    """R/N: part R of 0 to N-1."""
    try:
        rank, size = map(int, text.split("/"))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise argparse.ArgumentTypeError(f"{text} is not a part such as 0/4, 1/4, 2/4 or 3/4")
    return rank, size


def box(text: str) -> tuple[float, ...]:
    """Four numbers separated by commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(
            f"{text} is not TOP,LEFT,BOTTOM,RIGHT, such as 0.25,0.25,0.75,0.75"
        )
    return numbers


@dataclass(frozen=True, kw_only=True)
class DrawingArguments(ModelArguments):
    """How tokens are drawn."""

    seed: int = option(
        "image j of class c depends only on (seed, c, j)", 0, type=number_in(int, 0, 2**62)
    )
    cfg: Any = option(
        "guidance at the last scale; or one number per scale", 1.5, type=per_scale(float, 0)
    )
    top_k: Any = option(
        "keep the k most likely tokens, 0 for all; or one number per scale",
        0,
        type=per_scale(int, 0),
    )
    top_p: Any = option(
        "keep the most likely tokens of this mass, 0 for all; or one number per scale",
        0.0,
        type=per_scale(float, 0, 1),
    )
    temperature: Any = option(
        "divides the logits; or one number per scale", 1.0, type=per_scale(float, 1e-6)
    )
    more_smooth: bool = option(
        "Gumbel-softmax embeddings: smoother pictures, not for measurements",
        None,
        action=argparse.BooleanOptionalAction,
    )
    batch: int = option("images at a time", 32, type=positive)
    zoom: int = option("enlarge the pictures", 1, type=positive)

    def settings(self) -> Settings:
        from var_scale.model.sampling import Settings

        return Settings(self.cfg, self.top_k, self.top_p, self.temperature, bool(self.more_smooth))


@dataclass(frozen=True, kw_only=True)
class Sample(DrawingArguments):
    out: Path = option("picture (.png), .npz file, or folder", Path("samples.png"), metavar="PATH")
    format: str | None = option(
        "default: grid for .png, npz for .npz, otherwise png",
        None,
        choices=("grid", "png", "shards", "npz"),
    )
    classes: str | None = option(
        "numbers or names such as 0,3,tench; --classes=-1,3 for none and 3; default: the first "
        "ten, or all with --count",
        None,
    )
    per_class: int = option("images per class", 6, type=positive)
    one_generator: bool = option(
        "for a grid: draw all images with one generator, as the official code", False
    )
    count: int | None = option(
        "total number of images, divided equally among the classes", None, type=positive
    )
    paper: bool = option(
        "the paper's protocol: 50,000 images, cfg 1.5, top-k 900, top-p 0.96", False
    )
    processes: int = option("divide the images among processes, one per GPU", 1, type=positive)
    part: tuple[int, int] = option(
        "sample only part R of 0 to N-1, as in a job array", (0, 1), type=part, metavar="R/N"
    )
    steps_picture: Path | None = option(
        "also write a picture of every scale, coarse to fine", None, metavar="FILE.png"
    )


def sample(arguments: Sample) -> None:
    """Sample images: a grid picture, or with --count a folder of PNGs, WebDataset shards or the npz
    file of the ADM evaluator. The same command continues an interrupted one."""
    from var_scale.evaluate.request import SampleRequest, run_request

    request = SampleRequest(
        out=arguments.out,
        format=arguments.format,
        settings=arguments.settings(),
        seed=arguments.seed,
        classes=arguments.classes,
        per_class=arguments.per_class,
        count=arguments.count,
        batch=arguments.batch,
        paper=arguments.paper,
        one_generator=arguments.one_generator,
        processes=arguments.processes,
        part=arguments.part,
        steps_picture=arguments.steps_picture,
        zoom=arguments.zoom,
        device=arguments.device,
    )
    run_request(request, arguments.load)


@dataclass(frozen=True, kw_only=True)
class Edit(DrawingArguments):
    image: Path = argument("picture; resized and cropped at the centre to the model's size")
    box: Any = option(
        "part to redraw, as shares of height and width", None, type=box, metavar="T,L,B,R"
    )
    mask: Path | None = option("redraw where this picture is light", None, metavar="PICTURE")
    keep: bool = option("keep this part and redraw the rest (out-painting)", False)
    as_class: str | None = option("number or name; default: none", None, metavar="CLASS")
    count: int = option("number of edits, each with its own randomness", 4, type=positive)
    out: Path = option(
        "the given picture and its edits", Path("edit.png"), type=picture_file, metavar="FILE.png"
    )


def edit(arguments: Edit) -> None:
    """Redraw a part of a picture: in-painting, out-painting, or as another class. Zero-shot, as in
    the official notebook."""
    from var_scale.evaluate.request import EditRequest, run_edit

    request = EditRequest(
        image=arguments.image,
        out=arguments.out,
        box=arguments.box,
        mask=arguments.mask,
        keep=arguments.keep,
        as_class=arguments.as_class,
        count=arguments.count,
        seed=arguments.seed,
        settings=arguments.settings(),
        zoom=arguments.zoom,
    )
    run_edit(request, arguments.load)


def add(commands: Commands) -> None:
    """Add these commands."""
    command(commands, "sample", sample, Sample)
    # The settings of the official notebook.
    notebook = {"cfg": 3.0, "top_k": 900, "top_p": 0.95, "more_smooth": True}
    command(commands, "edit", edit, Edit).set_defaults(**notebook)
