"""Models as folders and on the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from var_scale.commands.arguments import Commands, command, family
from var_scale.commands.sample import load_model, model_arguments
from var_scale.errors import UserError


def hub_convert(args: argparse.Namespace) -> None:
    """A model of any kind as a folder: ours (safetensors, config.json, model card), or the official project's files or VARHF folder."""
    from var_scale.evaluate.card import numbers_of, write_card
    from var_scale.model.pretrained import save_official, save_pretrained, save_varhf
    from var_scale.progress import say

    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out}: is not empty; choose another folder")
    source = load_model(args, sampling=False)
    var, vae = source.var, source.var.vae_proxy[0]
    if args.to == "official":
        for path in save_official(args.out, var, vae):
            say(f"{path}: written")
        if vae.arch != "cnn" or 64 * var.depth != var.C:
            say("the official code cannot build this model, whose tokenizer or width it does not have; var-scale reads the files")
        return
    if args.to == "varhf":
        save_varhf(args.out, var, vae)
        say(f"{args.out}: written; the tokenizer is not in this form")
        return
    numbers = numbers_of(source.path) if (source.path / "run.json").exists() else source.told.get("numbers", {})
    # Of a folder that was made from a run, the run.
    what = (source.told.get("provenance") or source.what) | {"precision": source.what["precision"]}
    save_pretrained(args.out, var, vae, source.class_names, what, numbers)
    write_card(args.out, args.name or args.out.resolve().name, var, what, numbers)
    say(f"{args.out}: written")


def hub_pull(args: argparse.Namespace) -> None:
    """Fetch a model of the hub into its cache, check that it loads, and say where it lies."""
    from var_scale.model.hub import SCHEME
    from var_scale.progress import say

    if not args.model.startswith(SCHEME):
        raise UserError(f"{args.model}: is no address of the hub; give hf://OWNER/NAME or hf://OWNER/NAME/FILE")
    source = load_model(args, sampling=False)
    say(f"{args.model}: depth {source.var.depth}, {source.classes} classes, sha256 {source.what['sha256'][:16]}...; in {source.path}")


def hub_push(args: argparse.Namespace) -> None:
    """Put a folder of `hub convert` on the hub, after checking that it loads."""
    from var_scale.model.hub import push
    from var_scale.model.pretrained import is_pretrained, load_pretrained
    from var_scale.progress import say

    if not is_pretrained(args.folder):
        raise UserError(f"{args.folder}: is no folder of a model; make one with `var-scale hub convert`")
    load_pretrained(args.folder)
    say(push(args.folder, args.repository, args.private, args.message))


def add(commands: Commands) -> None:
    """Add these commands."""
    hub = family(commands, "hub", "models as folders and on the Hugging Face hub: convert, pull, push")
    sub = command(hub, "convert", hub_convert)
    model_arguments(sub)
    sub.add_argument("out", type=Path, help="folder to write")
    sub.add_argument("--to", choices=("ours", "official", "varhf"), default="ours", help="form of the folder")
    sub.add_argument("--name", default=None, help="title of the model card; default the folder's name")
    model_arguments(command(hub, "pull", hub_pull))
    sub = command(hub, "push", hub_push)
    sub.add_argument("folder", type=Path, help="folder of `hub convert`")
    sub.add_argument("repository", help="hf://OWNER/NAME, made if it is not there")
    sub.add_argument("--private", action="store_true", help="a new repository is private")
    sub.add_argument("--message", default="var-scale hub push", help="of the commit")
