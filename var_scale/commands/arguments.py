"""What the commands share: kinds of arguments, how a command is added, the config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from var_scale.config.schema import Config

EXIT_USER_ERROR = 2
Commands = argparse._SubParsersAction
Parser = argparse.ArgumentParser


def config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file or preset, such as study/tiny")
    text = "any changes, such as train.batch_size=64 or engine=fsdp"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def runs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=folder, default=Path("runs"), metavar="DIR", help="folder of all studies")


def label_arguments(parser: argparse.ArgumentParser) -> None:
    text = "text file with the name of class N (from 0) in line N + 1"
    parser.add_argument("--class-names", type=Path, default=None, metavar="FILE", help=text)
    parser.add_argument("--label-key", default=None, metavar="FIELD", help="in tars without .cls, the field of each .json with the class")


def folder(text: str) -> Path:
    """A folder, there or not."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; name a folder on disk")
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    return path


def picture_file(text: str) -> Path:
    """A PNG file to write."""
    if (path := Path(text)).suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not the name of a .png file")
    return path


def number_in(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """A reader of finite numbers from low to high."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (low <= number <= high and math.isfinite(number)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} " + (f"from {low} to {high}" if high < math.inf else f"from {low} up"))
        return number

    return read


def whole_numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,3,7") from None


def mapping(text: str) -> dict[str, str]:
    """FIELD=COLUMN with commas between."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as depth=layers,loss_avg=val_loss")
    return dict(pairs)


class OneLineParser(argparse.ArgumentParser):
    """A wrong argument is one line, like every other mistake; options are written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"error: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default in (None, False, []) or "default" in (action.help or "")
        return action.help if quiet else super()._get_help_string(action)


def command(group: Commands, name: str, function: Callable[[argparse.Namespace], None]) -> Parser:
    """A command whose help is the docstring of its function."""
    text = (function.__doc__ or "").strip()
    sub: Parser = group.add_parser(name, help=text, description=text, formatter_class=_Help)
    sub.set_defaults(function=function)
    return sub


def family(commands: Commands, name: str, text: str) -> Commands:
    """A group of commands; by itself it shows its help."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(function=lambda args: sub.print_help())
    group: Commands = sub.add_subparsers(metavar="COMMAND")
    return group


def load_config(args: argparse.Namespace) -> Config:
    from var_scale.config.load import load

    return load(args.config, args.overrides)


def text_lines(path: Path | None) -> list[str] | None:
    """Of a text file; None without one."""
    return path.read_text().splitlines() if path else None


def with_tokenizer(config: Config, runs: Path) -> Config:
    """Without tokenizer.weights: the tokenizer that `tokenizer train` made of this config, if it did."""
    from var_scale.model.load import tokenizer_file
    from var_scale.progress import say

    found = tokenizer_file(runs / config.name / "tokenizer")
    if config.tokenizer.weights or not found.exists():
        return config
    say(f"tokenizer: {found}")
    return config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"weights": str(found)})})
