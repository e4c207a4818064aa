"""Image and token shards."""

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
    label_arguments,
    load_config,
    number_in,
    picture_file,
    runs_argument,
    text_lines,
    with_tokenizer,
)
from var_scale.errors import UserError

if TYPE_CHECKING:
    pass


def data_synth(args: argparse.Namespace) -> None:
    """Generate the embedded set of a config (data.leaves or data.grammar) as WebDataset shards."""
    from var_scale.cluster.pipeline import Study, make_grammar, make_leaves

    config = load_config(args)
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
                        args.label_key, text_lines(args.class_names))  # fmt: skip
    for split, manifest in done.items():
        say(f"{split}: {manifest.num_samples:,} images of {manifest.num_classes} classes in {len(manifest.shards)} shards ({args.out})")


def data_index(args: argparse.Namespace) -> None:
    """Adopt WebDataset tars made by others, of a folder or at URLs: check every member, write the index and manifest.json."""
    from var_scale.data.index_urls import index_urls
    from var_scale.data.shards import index_folder
    from var_scale.progress import say

    names = text_lines(args.class_names)
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
        from var_scale.evaluate.pictures import contact_sheet

        contact_sheet(args.folder, args.sheet)
        say(f"{'sheet':24} {args.sheet}")


def data_tokenize(args: argparse.Namespace) -> None:
    """Image shards to token shards with the config's tokenizer."""
    from var_scale.cluster.pipeline import Study, tokenize_stage

    config = load_config(args)
    tokenize_stage(Study(config, args.runs).with_files() if config.study else with_tokenizer(config, args.runs))


def add(commands: Commands) -> None:
    """Add these commands."""
    data = family(commands, "data", "image and token shards: synth, shard, index, verify, info, tokenize")
    for name, function in (("synth", data_synth), ("tokenize", data_tokenize)):
        sub = command(data, name, function)
        config_argument(sub)
        runs_argument(sub)
    sub = command(data, "shard", data_shard)
    sub.add_argument("source", type=Path, help="folder of class folders or of train and val with such, .csv with path,label, or tars")
    sub.add_argument("out", type=Path, help="folder for the shards")
    sub.add_argument("--split", default=None, help="name of the split, where SOURCE is one; default train")
    sub.add_argument("--seed", type=int, default=0, help="key of the shuffle")
    sub.add_argument("--samples-per-shard", type=number_in(int, 1), default=1024, help="images a shard")
    sub.add_argument("--max-broken", type=float, default=0.01, help="share of images that may be unreadable before the job stops")
    sub.add_argument("--processes", type=number_in(int, 1), default=None, help="workers; default one a core")
    label_arguments(sub)
    for name, function in (("index", data_index), ("verify", data_verify), ("info", data_info)):
        sub = command(data, name, function)
        if name == "index":
            sub.add_argument("folder", help="folder of the shards, or URLs such as https://host/set/{00000..00099}.tar, which stay there")
            sub.add_argument("--out", type=folder, default=None, help="of URLs: folder for index and manifest, read like shards")
            sub.add_argument("--split", default="train", help="name of the split")
            sub.add_argument("--num-classes", type=number_in(int, 1), default=None, help="classes; default one more than the largest label")
            label_arguments(sub)
        else:
            sub.add_argument("folder", type=folder, help="folder of the shards")
        if name == "verify":
            sub.add_argument("--drop-bad", action="store_true", help="write the manifest again without the shards that have a problem")
        if name == "info":
            sub.add_argument("--sheet", type=picture_file, default=None, metavar="FILE.png", help="write a contact sheet: a row a class")
