"""What a trained model is for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from var_scale.commands.arguments import Commands, command, number_in, picture_file, whole_numbers
from var_scale.errors import UserError

if TYPE_CHECKING:
    pass


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


def add(commands: Commands) -> None:
    """Add these commands."""
    sub = command(commands, "sample", sample)
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("--out", type=picture_file, default=Path("samples.png"), metavar="FILE.png", help="picture to write")
    sub.add_argument("--classes", type=whole_numbers, default=None, help="class numbers, such as 0,3,7; default the first ten")
    sub.add_argument("--per-class", type=number_in(int, 1), default=6, help="images a class")
    sub.add_argument("--seed", type=number_in(int, 0, 2**62), default=0, help="seed of the first class; class c has seed + c")
    sub.add_argument("--cfg", type=number_in(float, 0), default=1.5, help="classifier-free guidance; 0: none")
    sub.add_argument("--top-k", type=number_in(int, 0), default=0, help="keep the k likeliest tokens; 0: all")
    sub.add_argument("--top-p", type=number_in(float, 0, 1), default=0.0, help="keep the likeliest tokens of this mass; 0: all")
    sub.add_argument("--more-smooth", action="store_true", help="Gumbel-softmax embeddings: smoother pictures")
    sub.add_argument("--zoom", type=number_in(int, 1), default=1, help="enlarge the picture")
