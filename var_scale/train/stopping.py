"""When to stop: on a signal, a STOP file in the run folder, or the death of the process that
started this one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PARENT_ENV = "VAR_SCALE_PARENT"  # pid:start-time of the process that started the run


def process_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process no longer exists."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_identity(pid: int) -> str | None:
    """pid:start-time, which a reused pid does not repeat; None if the process no longer exists."""
    fields = process_fields(pid)
    return None if not fields or fields[0] in "ZX" else f"{pid}:{fields[19]}"


def launchers() -> list[str]:
    """Identities of the parent and of DeepSpeed's launchers above it.

    `deepspeed` starts a launcher for the node, which starts the ranks; each leaves the processes
    that it started running when it is killed.
    """
    found, pid = [], os.getppid()
    while identity := process_identity(pid):
        found.append(identity)
        if not (fields := process_fields(pid)):  # it has ended since
            break
        pid = int(fields[1])
        try:
            if "deepspeed" not in Path(f"/proc/{pid}/cmdline").read_text():
                break
        except OSError:
            break
    return found


def orphaned(parent: int, above: list[str]) -> bool:
    """Whether the parent or a launcher above it died."""
    return os.getppid() != parent or not all(_alive(one) for one in above)


def end_with_launcher() -> None:
    """End this process, from a thread, when the process that started it no longer exists.

    For workers that have nothing to save.
    """
    parent, above = os.getppid(), launchers()

    def watch() -> None:
        while not orphaned(parent, above):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_noted() -> Iterator[list[str]]:
    """Collect the names of SIGTERM, SIGUSR1 and SIGINT in a list instead of handling them.

    A second SIGINT raises KeyboardInterrupt. For training within the process of a command, in its
    main thread; the handlers are restored afterwards.
    """
    noted: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class StopRequest:
    """A request to stop: SIGTERM, SIGUSR1, SIGINT, and from `watch` on the file RUN/STOP or the
    death of the launcher above this process. `close` restores the signal handlers."""

    def __init__(self, stop_file: Path):
        self.stop_file = stop_file
        self.reason, self.since, self.closed = "", 0.0, False
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = [(number, signal.signal(number, self._on_signal)) for number in numbers]
        self._orchestrator = os.environ.get(PARENT_ENV)
        self._parent, self._launchers = os.getppid(), launchers()

    def watch(self) -> None:
        """Start to look for the file STOP, which an earlier attempt may have left until now, and at
        the launcher."""
        threading.Thread(target=self._watch, daemon=True).start()

    def note(self, reason: str) -> None:
        """Request a stop; the first reason stays."""
        if not self.reason:
            self.since, self.reason = time.monotonic(), reason

    def close(self) -> None:
        """Stop watching and restore the handlers that were replaced."""
        self.closed = True
        for number, handler in self._before:
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note(signal.Signals(number).name)

    def _watch(self) -> None:
        while not self.reason and not self.closed:
            if orphaned(self._parent, self._launchers):
                self.note("the launcher died")
            if self._orchestrator and not _alive(self._orchestrator):
                self.note("the process that started this run died")
            if self.stop_file.exists():
                self.note("the file STOP exists")
            time.sleep(0.5)


def _alive(identity: str) -> bool:
    """Whether the process pid:start-time still runs."""
    return process_identity(int(identity.split(":", maxsplit=1)[0])) == identity
