"""What a trained model is for: samples, edits, measures, the hub."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_scale.commands.arguments import Commands, Parser, command, number_in, picture_file
from var_scale.errors import UserError

if TYPE_CHECKING:
    import torch

    from var_scale.evaluate.source import Source
    from var_scale.model.sampling import Settings


def _per_scale(kind: Callable[[str], Any], low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A number, or one a scale with commas between."""
    read = number_in(kind, low, high)
    return lambda text: tuple(read(part) for part in text.split(",")) if "," in text else read(text)


def model_arguments(sub: Parser) -> None:
    """Which model, how exact."""
    sub.add_argument("model", help="run folder, folder of a model, official .pth, hf://OWNER/NAME, or hf://FoundationVision/var/var_d16.pth")
    sub.add_argument("--vae", default=None, metavar="FILE", help="tokenizer of official weights; on the hub the one beside them")
    sub.add_argument("--step", type=number_in(int, 0), default=None, help="checkpoint of a run; default the newest")
    sub.add_argument("--averaged", action="store_true", help="the averaged weights of a run with train.ema")
    sub.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the transformer's weights")
    sub.add_argument("--device", default=None, help="such as cuda:1; default the first GPU, else the CPU")


def device_of(args: argparse.Namespace) -> torch.device:
    """--device, by default the first GPU, else the CPU."""
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {args.device}: is not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {args.device}: this machine shows {torch.cuda.device_count()} GPUs; use cpu, or one that is there")
    return device


def load_model(args: argparse.Namespace, sampling: bool = True) -> Source:
    """The model of `model_arguments`."""
    from var_scale.evaluate.source import load_source

    return load_source(args.model, device_of(args), step=args.step, vae=args.vae, precision=args.precision, averaged=args.averaged,
                       sampling=sampling)  # fmt: skip


def drawing_arguments(sub: Parser, cfg: float = 1.5) -> None:
    """How tokens are drawn."""
    sub.add_argument("--seed", type=number_in(int, 0, 2**62), default=0, help="image j of class c depends on (seed, c, j) alone")
    sub.add_argument("--cfg", type=_per_scale(float, 0), default=cfg, help="guidance; a number rises to it; also one a scale")
    sub.add_argument("--top-k", type=_per_scale(int, 0), default=0, help="keep the k likeliest tokens; 0: all; also k0,k1,...")
    sub.add_argument("--top-p", type=_per_scale(float, 0, 1), default=0.0, help="keep the likeliest tokens of this mass; also p0,p1,...")
    sub.add_argument("--temperature", type=_per_scale(float, 1e-6), default=1.0, help="divides the logits; also one a scale")
    sub.add_argument("--more-smooth", action=argparse.BooleanOptionalAction, default=False,
                     help="Gumbel-softmax embeddings: smoother pictures, not for measurements")  # fmt: skip
    sub.add_argument("--batch", type=number_in(int, 1), default=32, help="images at a time")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of `drawing_arguments`."""
    from var_scale.model.sampling import Settings

    return Settings(args.cfg, args.top_k, args.top_p, args.temperature, args.more_smooth)


def _part(text: str) -> tuple[int, int]:
    """R/N: part R of 0..N-1."""
    try:
        rank, size = map(int, text.split("/"))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise argparse.ArgumentTypeError(f"{text} is not a part such as 0/4, 1/4, 2/4 or 3/4")
    return rank, size


def sample(args: argparse.Namespace) -> None:
    """Sample images: a grid picture, or with --count a folder of PNGs, WebDataset shards or the evaluator's npz, resumable."""
    from dataclasses import replace

    from var_scale.evaluate.generate import PAPER
    from var_scale.model.sampling import Settings

    kind = _kind_of(args)
    if args.paper:
        if settings_of(args) != Settings():
            raise UserError("--paper: has its own guidance, filters and temperature; leave yours out, or --paper")
        args.count, args.cfg, args.top_k, args.top_p = args.count or 50000, PAPER.cfg, PAPER.top_k, PAPER.top_p
    settings = replace(PAPER) if args.paper else settings_of(args)
    children = _spawn(args) if args.processes > 1 else []
    try:
        _sample(args, kind, settings, children)
    except BaseException:  # an error here, or a signal: nobody goes on alone
        for child in children:
            child.terminate()
        raise


def _sample(args: argparse.Namespace, kind: str, settings: Settings, children: list[subprocess.Popen[bytes]]) -> None:
    """The part of this process, then what the children have left to be put together."""
    from var_scale.evaluate.generate import Job, generate, grid_of_classes
    from var_scale.evaluate.pictures import steps_picture, write_grid
    from var_scale.progress import say

    out, source = args.out, load_model(args)
    first = source.classes if args.count else min(10, source.classes)
    classes = source.find(args.classes.split(",")) if args.classes else list(range(first))
    if args.steps_picture:
        steps_picture(source, classes[:8], args.seed, settings, args.steps_picture, args.zoom)
        say(f"coarse to fine{f', the first 8 of {len(classes)} classes' if len(classes) > 8 else ''}: {args.steps_picture}")
    if kind == "grid":
        images = grid_of_classes(source, classes, args.per_class, args.seed, settings, args.batch, args.one_generator)
        write_grid(images, out, zoom=args.zoom, names=[source.label(c) for c in classes])
        say(f"{len(classes)} classes x {args.per_class} images: {out}")
        return
    job = Job(tuple(classes), args.count or args.per_class * len(classes), args.seed, settings)
    done = generate(source, job, out, kind, args.batch, args.part)
    if children:
        if failed := [child.args for child in children if child.wait()]:
            raise UserError(f"{out}: {len(failed)} of {args.processes} processes failed; the same command makes what is missing")
        done = done or generate(source, job, out, kind, args.batch, args.part)
    if done:
        say(f"{job.count:,} images of {len(classes)} classes: {out}")


def _kind_of(args: argparse.Namespace) -> str:
    """grid, png, shards or npz; UserError for a combination that means nothing."""
    if args.out.suffix.lower() not in ("", ".png", ".npz"):
        raise UserError(f"--out {args.out}: a grid is a .png file, an npz a .npz file, png and shards are folders")
    if args.out.is_dir() and args.out.suffix.lower() in (".png", ".npz"):
        raise UserError(f"--out {args.out}: is a folder; choose another name for the file")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / "samples.json").exists():
        raise UserError(f"--out {args.out}: is a folder with other things in it; choose another place")
    kind = args.format or ("npz" if args.out.suffix == ".npz" else "grid" if args.out.suffix == ".png" else "png")
    if (kind == "npz") != (args.out.suffix == ".npz") or (kind == "grid") != (args.out.suffix.lower() == ".png"):
        raise UserError(f"--out {args.out}: a grid is a .png file, an npz a .npz file, png and shards are folders")
    if kind == "grid":
        refuse_among_samples(args.out, "--out")
    if args.steps_picture:
        refuse_among_samples(args.steps_picture, "--steps-picture")
        if args.steps_picture.resolve() == args.out.resolve():
            raise UserError("--steps-picture and --out: are the same file; give two names")
    if kind == "grid" and (args.count or args.paper or args.part != (0, 1) or args.processes > 1):
        raise UserError(f"--out {args.out}: is one picture; give a folder or an .npz for --count, --paper, --part and --processes")
    if args.one_generator and kind != "grid":
        raise UserError(f"--one-generator: is for a grid; images of {args.out} have a seed each, so that parts can be made anywhere")
    if args.processes > 1 and args.part != (0, 1):
        raise UserError("--processes and --part: give one of them")
    return kind


def refuse_among_samples(path: Path, option: str) -> None:
    """UserError for a picture that would lie, or take one's place, among the samples of a folder."""
    if (path.parent / "samples.json").exists():
        raise UserError(f"{option} {path}: that folder holds samples of its own; choose another place")


def _spawn(args: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Start the parts 1/N, 2/N, ... as processes of their own, a GPU each where there are some; part 0 is left for this one."""
    import torch

    gpus = torch.cuda.device_count()
    command, skip = [], False
    for word in sys.argv[1:]:  # this very command, but for --processes
        skip, dropped = word == "--processes", skip
        if not (skip or dropped or word.startswith("--processes=")):
            command.append(word)
    children = []
    for rank in range(1, args.processes):
        device = ["--device", f"cuda:{rank % gpus}"] if gpus and not args.device else []
        line = [sys.executable, "-m", "var_scale.cli", *command, "--part", f"{rank}/{args.processes}", *device]
        children.append(subprocess.Popen(line, stdout=subprocess.DEVNULL))  # their parts are as large as that of this process
    args.part = (0, args.processes)
    return children


def edit(args: argparse.Namespace) -> None:
    """Draw a part of a picture anew: in-painting, out-painting, or as another class (zero-shot, as the official notebook)."""
    import numpy as np

    from var_scale.evaluate.edit import box_mask, edit, image_mask, read_picture
    from var_scale.evaluate.pictures import write_grid
    from var_scale.progress import say
    from var_scale.scales import grid

    if (args.box is None) == (args.mask is None):
        raise UserError("edit: give --box TOP,LEFT,BOTTOM,RIGHT or --mask PICTURE, one of them")
    if args.out.resolve() in (args.image.resolve(), args.mask.resolve() if args.mask else None):
        raise UserError(f"--out {args.out}: is a picture that is read; choose another name")
    refuse_among_samples(args.out, "--out")
    source = load_model(args)
    (label,) = source.find([args.as_class], "--as-class") if args.as_class else [-1]
    image = read_picture(args.image, source.var.vae_proxy[0].image_size)
    mask = box_mask(args.box, grid(source.var.patch_nums[-1])) if args.box else image_mask(args.mask)
    redraw = 1 - mask if args.keep else mask
    if not (redraw > 0.5).any():
        raise UserError("--keep: the box or mask is the whole picture, so nothing would be drawn anew; keep less")
    drawn = edit(source, image, redraw, label, args.count, args.seed, settings_of(args))
    write_grid(np.concatenate([image[None], drawn])[None], args.out, zoom=args.zoom, names=[{0: "given", 1: source.label(label)}])
    say(f"{args.count} edits, {source.label(label)}: {args.out}")


def _box(text: str) -> tuple[float, ...]:
    """Four numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not TOP,LEFT,BOTTOM,RIGHT, such as 0.25,0.25,0.75,0.75")
    return numbers


def add(commands: Commands) -> None:
    """Add these commands."""
    sub = command(commands, "sample", sample)
    model_arguments(sub)
    sub.add_argument("--out", type=Path, default=Path("samples.png"), metavar="PATH", help="picture (.png), .npz, or folder")
    sub.add_argument("--format", choices=("grid", "png", "shards", "npz"), default=None, help="default by --out: .png, .npz, else png")
    sub.add_argument("--classes", default=None, help="numbers or names such as 0,3,tench; --classes=-1,3: none, 3; default ten, or all")
    sub.add_argument("--per-class", type=number_in(int, 1), default=6, help="images a class")
    sub.add_argument("--one-generator", action="store_true", help="of a grid: one generator from --seed draws all, as the official code")
    sub.add_argument("--count", type=number_in(int, 1), default=None, help="images in all, in equal parts of the classes")
    sub.add_argument("--paper", action="store_true", help="the paper's protocol: 50,000 images, cfg 1.5, top-k 900, top-p 0.96")
    drawing_arguments(sub)
    sub.add_argument("--processes", type=number_in(int, 1), default=1, help="share the images among processes, one a GPU")
    sub.add_argument("--part", type=_part, default=(0, 1), metavar="R/N", help="make only part R of 0 to N-1, as in a job array")
    sub.add_argument("--steps-picture", type=Path, default=None, metavar="FILE.png", help="also a picture of every scale, coarse to fine")
    sub.add_argument("--zoom", type=number_in(int, 1), default=1, help="enlarge the pictures")

    sub = command(commands, "edit", edit)
    model_arguments(sub)
    sub.add_argument("image", type=Path, help="picture; resized and cropped in the middle where it has another size")
    sub.add_argument("--box", type=_box, default=None, metavar="T,L,B,R", help="part to draw anew, as shares of height and width")
    sub.add_argument("--mask", type=Path, default=None, metavar="PICTURE", help="draw anew where this picture is light")
    sub.add_argument("--keep", action="store_true", help="the other way round: keep that part and draw the rest (out-painting)")
    sub.add_argument("--as-class", default=None, metavar="CLASS", help="number or name; default none")
    sub.add_argument("--count", type=number_in(int, 1), default=4, help="edits, each with other random numbers")
    sub.add_argument("--out", type=picture_file, default=Path("edit.png"), metavar="FILE.png", help="the given picture, then the edits")
    drawing_arguments(sub, cfg=3.0)
    sub.set_defaults(top_k=900, top_p=0.95, more_smooth=True)
    sub.add_argument("--zoom", type=number_in(int, 1), default=1, help="enlarge the picture")
