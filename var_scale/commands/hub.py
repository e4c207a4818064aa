"""`hub`: models as folders and on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from var_scale.commands.arguments import (
    Commands,
    ModelArguments,
    argument,
    command,
    family,
    option,
)


@dataclass(frozen=True, kw_only=True)
class _Out:
    out: Path = argument("folder to write")


@dataclass(frozen=True, kw_only=True)
class HubConvert(_Out, ModelArguments):
    """The folder comes after the model: fields of the first base class come last."""

    to: str = option("format of the folder", "ours", choices=("ours", "official", "varhf"))
    name: str | None = option("title of the model card; default: the name of the folder", None)


def hub_convert(arguments: HubConvert) -> None:
    """Write a model of any kind as a folder: ours (safetensors, config.json, model card), the
    official project's files, or its VARHF folder."""
    from var_scale.evaluate.convert import convert, require_empty
    from var_scale.progress import say

    require_empty(arguments.out)
    source = arguments.load(sampling=False)
    for line in convert(source, arguments.out, arguments.to, arguments.name):
        say(line)


def hub_pull(arguments: ModelArguments) -> None:
    """Download a model of the hub into the cache, check that it loads, and print where it is."""
    from var_scale.evaluate.convert import require_hub_address
    from var_scale.progress import say

    require_hub_address(arguments.model)
    source = arguments.load(sampling=False)
    say(
        f"{arguments.model}: depth {source.var.depth}, {source.classes} classes, "
        f"sha256 {source.what['sha256'][:16]}...; in {source.path}"
    )


@dataclass(frozen=True, kw_only=True)
class HubPush:
    folder: Path = argument("folder written by `hub convert`")
    repository: str = argument("hf://OWNER/NAME; created if it does not exist")
    private: bool = option("make a new repository private", False)
    message: str = option("message of the commit", "var-scale hub push")


def hub_push(arguments: HubPush) -> None:
    """Upload a folder of `hub convert` to the hub, after checking that it loads."""
    from var_scale.evaluate.convert import push_folder
    from var_scale.progress import say

    folder, repository = arguments.folder, arguments.repository
    say(push_folder(folder, repository, arguments.private, arguments.message))


def add(commands: Commands) -> None:
    """Add these commands."""
    hub = family(
        commands, "hub", "models as folders and on the Hugging Face hub: convert, pull, push"
    )
    command(hub, "convert", hub_convert, HubConvert)
    command(hub, "pull", hub_pull, ModelArguments)
    command(hub, "push", hub_push, HubPush)
