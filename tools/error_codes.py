"""Writes docs/reference/errors.md: exit codes, error codes, causes of run ends, reasons of fits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from var_scale.cli import EXIT_INTERRUPTED
from var_scale.errors import CODES, EXIT_USER_ERROR
from var_scale.laws.law import FAILURES
from var_scale.records import gate
from var_scale.records.table import EXIT_NO_LAW
from var_scale.run_folder import CAUSES, EXIT_DIVERGED, EXIT_HUNG, EXIT_REQUEUE

EXITS = {
    0: "the command succeeded",
    EXIT_NO_LAW: "`fit` found no law and printed the reason; or an unexpected error with its stack",
    EXIT_USER_ERROR: "an error that you can fix: one line names what is wrong, where, and the fix",
    EXIT_DIVERGED: "a run diverged: too many steps had a loss or gradient that was not finite",
    EXIT_HUNG: "a run hung: no rank made progress for `train.hang_seconds`",
    EXIT_REQUEUE: "the run was asked to stop and saved its state; the same command continues it",
    EXIT_INTERRUPTED: "you interrupted a command (Ctrl-C); run it again",
}
HEAD = """# Exit codes, error codes and causes

Programs match exit codes, error codes and causes, which are stable. The wording of a message can
change. `make docs` writes this page."""


def page() -> str:
    """The text of docs/reference/errors.md."""
    parts = [
        HEAD,
        "## Exit codes",
        _table("exit code", EXITS),
        "## Error codes",
        "An error that you can fix is a `var_scale.errors.UserError`. Its attribute `code` starts "
        "with the part of the program that found the error. When such an error ends a run, its "
        "code is also the `cause` in `status.json`.",
    ]
    # Sorted, because the groups of the registry need not be contiguous.
    for room, codes in groupby(sorted(CODES), key=lambda code: code.partition(".")[0]):
        parts += [f"### {room}", _table("code", {code: CODES[code] for code in codes})]
    parts += [
        "## Causes of run ends",
        "`cause` in `status.json` of a run is one of these or an error code. It is empty as long "
        "as nothing went wrong.",
        _table("cause", CAUSES),
        "## Codes of excluded runs",
        "The health gate excludes a run from the fits by one of these codes. The report and `gate` "
        "in `fit.json` show them.",
        _table("code", gate.CODES),
        "## Codes of failed fits",
        "A fit that did not converge has a `reason` and one of these codes in `fit.json`.",
        _table("code", FAILURES),
    ]
    return "\n\n".join(parts) + "\n"


def _table(name: str, rows: Mapping[Any, str]) -> str:
    lines = [f"| `{key}` | {text.replace('|', '/')} |" for key, text in rows.items()]
    return "\n".join([f"| {name} | meaning |", "|---|---|", *lines])
