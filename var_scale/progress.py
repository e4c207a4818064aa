"""Printed output: progress with the remaining time, tables, durations, short numbers."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_INTERVAL_SECONDS = 5.0


def say(text: str) -> None:
    """Print one line and flush, so that logs keep up with the work.

    If nobody reads the output any more, as after `| head`, the work continues without it.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_any_name() -> None:
    """Let this process and those that it starts print names that the encoding of their output
    cannot show, such as accents in a C locale or file names that are not UTF-8: escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")


def print_table(table: Table) -> None:
    """Print a table; without a terminal, 160 columns wide so that no column is cut off."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def duration(seconds: float) -> str:
    """A time such as 12 s, 3 min 20 s, 2 h 05 min or 3.5 days."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 72 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """Progress towards `total`, printed as a line every few seconds.

    The remaining time is estimated from the work done since the start, without `initial`.
    """

    def __init__(self, label: str, total: float, unit: str, initial: float = 0):
        self.label, self.total, self.unit = label, total, unit
        self.initial = self.done = initial
        self.start = self.last_print = time.monotonic()
        self.note = self.printed = ""

    def update(self, done: float, note: str = "") -> None:
        """Set the count so far (not an increment), and a short text such as a loss."""
        self.done, self.note = done, note
        self._show(final=False)

    def remaining_seconds(self) -> float | None:
        """Estimated seconds left; None before any work is done."""
        gained = self.done - self.initial
        if gained <= 0:
            return None
        return (time.monotonic() - self.start) / gained * (self.total - self.done)

    def line(self) -> str:
        """Count, note and remaining time as one line."""
        left = self.remaining_seconds()
        parts = [f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        if self.note:
            parts.append(self.note)
        if left is not None and self.done < self.total:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _show(self, final: bool) -> None:
        now = time.monotonic()
        if final or now - self.last_print >= PLAIN_INTERVAL_SECONDS:
            self.last_print = now
            if self.line() != self.printed:
                self.printed = self.line()
                say(self.printed)

    def close(self) -> None:
        """Show the final count."""
        self._show(final=True)


class _Bar(Progress):
    """Progress drawn as a bar on a terminal, which has room for one at a time."""

    free = Lock()

    def __init__(self, label: str, total: float, unit: str, initial: float = 0):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        super().__init__(label, total, unit, initial)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "  {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.rich = RichProgress(*columns)
        self.task = self.rich.add_task(label, total=total, completed=int(initial), note="")
        self.rich.start()

    def _show(self, final: bool) -> None:
        self.rich.update(self.task, completed=self.done, note=self.note)
        if final:
            self.rich.stop()
            _Bar.free.release()


class _Hidden(Progress):
    """Progress that is not shown, because another rank shows it."""

    def _show(self, final: bool) -> None:
        """Nothing."""


@contextmanager
def progress(
    label: str, total: float, unit: str, initial: float = 0, shown: bool = True
) -> Iterator[Progress]:
    """Show the progress of work: a bar on a terminal, lines elsewhere.

    Use it as `with progress("tokenise", 8192, "images") as bar: ... bar.update(done)`.

    Args:
        initial: count that was reached before, by a run that is continued.
        shown: False on ranks that are silent.
    """
    kind: type[Progress] = _Hidden
    if shown:
        kind = _Bar if sys.stdout.isatty() and _Bar.free.acquire(blocking=False) else Progress
    bar = kind(label, total, unit, initial)
    try:
        yield bar
    finally:
        bar.close()


def short(value: float) -> str:
    """A number with three digits and a letter, such as 18.5 M or 2.01 B."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:g}"
