"""The command `var-scale`. Its subcommands are in `commands/`, one thin function each.

Those functions import what they need themselves, so that `var-scale --help` starts quickly.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from var_scale.commands import bench, data, evaluate, hub, sample, study, train
from var_scale.commands.arguments import NoArguments, OneLineParser, command
from var_scale.errors import EXIT_USER_ERROR, Preempted, UserError
from var_scale.files import full_disk
from var_scale.interrupts import signals_interrupt
from var_scale.launchers import without_launcher
from var_scale.progress import show_any_name

EXIT_INTERRUPTED = 130


def doctor(_: NoArguments) -> None:
    """Show what this machine provides, and what each missing piece means."""
    from var_scale.jobs.doctor import doctor

    doctor()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands."""
    parser = OneLineParser(prog="var-scale", description="Scaling studies of VAR image models.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")
    command(commands, "doctor", doctor, NoArguments)
    for module in (data, train, study, sample, evaluate, hub, bench):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    A mistake of the user is one line on stderr, with its error code in brackets, and exit code 2
    (or the exit code of the error). Ctrl-C and signals exit with code 130, or with 85 after a run
    has saved.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(text.startswith("-") for text in rest):
        args.overrides, rest = [*args.overrides, *rest], []  # key=value after options
    if rest:
        unknown = [text for text in rest if text.startswith("-")] or rest
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.version:
        from var_scale import __version__

        print(__version__)
        return
    if not hasattr(args, "function"):
        parser.print_help()
        return
    # A command is no rank of the job or notebook that it is called from.
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        del os.environ[name]
    show_any_name()
    try:
        with signals_interrupt():  # files are completed or removed, and runs are saved
            args.function(args)
            sys.stdout.flush()  # here an error of the output is reported
    except UserError as error:
        print(f"error: {error} [{error.code}]", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stopped:
        print("stopped; run the same command to continue", file=sys.stderr)
        from var_scale.run_folder import EXIT_REQUEUE

        sys.exit(EXIT_REQUEUE if isinstance(stopped, Preempted) else EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a path that is a file where a folder is needed
        if full := full_disk(error, error.filename or "standard output"):
            if not error.filename:  # the end of the process would try to print the rest
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"error: {full} [{full.code}]", file=sys.stderr)
            sys.exit(full.exit_code)
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
