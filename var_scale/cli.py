"""The `var-scale` command: its subcommands lie in `commands/`, one thin function each; heavy imports inside the functions."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from var_scale.commands import bench, data, evaluate, hub, sample, study, train
from var_scale.commands.arguments import EXIT_USER_ERROR, OneLineParser, command
from var_scale.errors import Preempted, UserError
from var_scale.run_folder import EXIT_REQUEUE

EXIT_INTERRUPTED = 130


def doctor(args: argparse.Namespace) -> None:
    """What this machine has, and what each missing piece costs."""
    from var_scale.cluster.doctor import doctor

    doctor()


def build_parser() -> argparse.ArgumentParser:
    """All subcommands."""
    parser = OneLineParser(prog="var-scale", description="Scaling studies of VAR image models.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")
    command(commands, "doctor", doctor)
    for module in (data, train, study, sample, evaluate, hub, bench):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one line and exit code 2."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides, rest = [*args.overrides, *rest], []  # key=value may also stand after options
    if rest:
        parser.error(f"unknown arguments: {' '.join(text for text in rest if text.startswith('-')) or ' '.join(rest)}")
    if args.version:
        from var_scale import __version__

        print(__version__)
        return
    if not hasattr(args, "function"):
        parser.print_help()
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as Ctrl-C: files are finished or removed, runs are saved
        signal.signal(number, signal.default_int_handler)
    try:
        args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(EXIT_REQUEUE if isinstance(stopped, Preempted) else EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path that is a file where a folder is needed, a folder in place of a file, ...
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
