"""How commands are declared: one frozen dataclass per command, whose fields become its options.

A field made by `argument` is positional, one made by `option` is `--name`. Dataclasses for what
several commands share (a config, the folder of all studies, a model) are base classes here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from var_scale.errors import EXIT_USER_ERROR

if TYPE_CHECKING:
    from var_scale.config.schema import Config
    from var_scale.evaluate.source import Source
    from var_scale.study.study import Study

Commands = argparse._SubParsersAction
Parser = argparse.ArgumentParser
Arguments = TypeVar("Arguments")


def argument(text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A positional argument: a field of a command's dataclass.

    Args:
        text: its help.
        default: its value if it is not given.
        options: further arguments of `ArgumentParser.add_argument`. Without `type`, the type is
            that of the field.
    """
    return dataclasses.field(default=default, metadata={"help": text, **options})


def option(text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """An option `--name`; required where it has no default, a switch where its default is False."""
    if default is False:
        options["action"] = "store_true"
    return argument(text, default, option=True, **options)


def path(text: str) -> Path:
    """A path, in which `~` is the home folder: shells leave it in --out=~/x and key=~/x."""
    return Path(expanduser(text))


def folder_path(text: str) -> Path:
    """A folder, which may not exist yet."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a folder on disk")
    if (folder := path(text)).exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return folder


def picture_file(text: str) -> Path:
    """A PNG file to write."""
    if (picture := path(text)).suffix.lower() != ".png" or picture.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return picture


def number_in(
    kind: Callable[[str], float], low: float, high: float = math.inf
) -> Callable[[str], float]:
    """A parser of finite numbers from low to high."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (low <= number <= high and math.isfinite(number)):
            what = "a whole number" if kind is int else "a number"
            limits = f"from {low} to {high}" if high < math.inf else f"from {low} up"
            raise argparse.ArgumentTypeError(f"{text} is not {what} {limits}")
        return number

    return read


positive = number_in(int, 1)


def whole_numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 0,3,7"
        ) from None


def mapping(text: str) -> dict[str, str]:
    """FIELD=COLUMN pairs separated by commas."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list such as depth=layers,loss_avg=val_loss"
        )
    return dict(pairs)


@dataclass(frozen=True, kw_only=True)
class NoArguments:
    """A command without arguments."""


@dataclass(frozen=True, kw_only=True)
class ConfigArguments:
    """A config with changes."""

    config: str = argument("config file, or name of a preset such as study/tiny")
    overrides: Sequence[str] = argument(
        "changes, such as train.batch_size=64 or engine=fsdp", (), nargs="*", metavar="key=value"
    )

    def load(self) -> Config:
        from var_scale.config.load import load
        from var_scale.study.manifests import with_manifests

        return with_manifests(load(self.config, self.overrides))


@dataclass(frozen=True, kw_only=True)
class StudyArguments(ConfigArguments):
    """A config with changes, and the folder of all studies."""

    runs: Path = option("folder of all studies", Path("runs"), type=folder_path, metavar="DIR")

    def study(self) -> Study:
        from var_scale.study.study import Study

        return Study(self.load(), self.runs)


@dataclass(frozen=True, kw_only=True)
class LabelArguments:
    """How class labels of images are found."""

    class_names: Path | None = option(
        "text file with the name of class N in line N + 1", None, metavar="FILE"
    )
    label_key: str | None = option(
        "for tars without .cls: field of each .json with the class", None, metavar="FIELD"
    )

    def names(self) -> list[str] | None:
        from var_scale.files import read_lines

        return read_lines(self.class_names) if self.class_names else None


@dataclass(frozen=True, kw_only=True)
class DeviceArguments:
    """Where to compute."""

    device: str | None = option("such as cpu or cuda:1; default: the first GPU, else the CPU", None)


@dataclass(frozen=True, kw_only=True)
class ModelArguments(DeviceArguments):
    """A trained model, and the precision of its weights."""

    model: str = argument(
        "run folder, model folder, official .pth file, hf://OWNER/NAME or hf://OWNER/NAME/FILE.pth",
        type=expanduser,
    )
    vae: str | None = option(
        "tokenizer of official weights; default: beside them on the hub",
        None,
        type=expanduser,
        metavar="FILE",
    )
    step: int | None = option(
        "checkpoint of a run; default: the newest", None, type=number_in(int, 0)
    )
    averaged: bool = option("use the averaged weights of a run with train.ema", False)
    precision: str = option(
        "precision of the transformer", "fp32", choices=("fp32", "bf16", "fp16")
    )

    def load(self, sampling: bool = True) -> Source:
        from var_scale.evaluate.source import choose_device, load_source

        return load_source(
            self.model,
            choose_device(self.device),
            step=self.step,
            vae=self.vae,
            precision=self.precision,
            averaged=self.averaged,
            sampling=sampling,
        )


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument as one line, and does not accept abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options, unless they are empty or the help already states them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default in (None, False, [], ()) or "default" in (action.help or "")
        return action.help if quiet else super()._get_help_string(action)


def command(
    group: Commands,
    name: str,
    function: Callable[[Arguments], None],
    arguments: type[Arguments],
) -> Parser:
    """Add a command.

    Args:
        function: runs the command; its docstring is the help.
        arguments: the dataclass that `function` takes. Its fields become arguments and options.
    """
    text = " ".join((function.__doc__ or "").split())
    parser: Parser = group.add_parser(name, help=text, description=text, formatter_class=_Help)
    fields = dataclasses.fields(arguments)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    for field in fields:
        _add(parser, field)
    parser.set_defaults(
        function=lambda given: function(arguments(**{name: getattr(given, name) for name in names}))
    )
    return parser


def _add(parser: Parser, field: dataclasses.Field[Any]) -> None:
    """Add the argument or option of one field."""
    options: dict[str, Any] = dict(field.metadata)
    if "action" not in options:
        # Annotations are strings here: "Sequence[Path]" and "Path | None" are read as Path.
        kind = str(field.type).removesuffix(" | None").removeprefix("Sequence[").removesuffix("]")
        options.setdefault("type", {"Path": path, "int": int, "float": float}.get(kind))
    required = field.default is dataclasses.MISSING
    if not required:
        options["default"] = field.default
    if options.pop("option", False):
        parser.add_argument(f"--{field.name.replace('_', '-')}", required=required, **options)
    else:
        parser.add_argument(field.name, **options)


def family(commands: Commands, name: str, text: str) -> Commands:
    """A group of commands; alone it shows its help."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(function=lambda args: parser.print_help())
    group: Commands = parser.add_subparsers(metavar="COMMAND")
    return group
