"""When to stop: a signal, a STOP file in the run folder, or the death of the process that started this one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PARENT_ENV = "VAR_SCALE_PARENT"  # "pid:start time" of the orchestrating process


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the process's state on; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_identity(pid: int) -> str | None:
    """pid:start-time, so that a reused pid is not mistaken; None when the process is gone."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else f"{pid}:{fields[19]}"


def launchers() -> list[str]:
    """Identities of the parent and of DeepSpeed's launchers above it: `deepspeed` starts a launcher for the node, which starts the ranks,
    and each leaves what it started running when it is killed."""
    found, pid = [], os.getppid()
    while identity := process_identity(pid):
        found.append(identity)
        pid = int(_stat(pid)[1])
        try:
            if "deepspeed" not in Path(f"/proc/{pid}/cmdline").read_text():
                break
        except OSError:
            break
    return found


def orphaned(parent: int, above: list[str]) -> bool:
    """Whether the parent or a launcher above has died."""
    return os.getppid() != parent or any(process_identity(int(one.split(":")[0])) != one for one in above)


def end_with_launcher() -> None:
    """For workers that have nothing to save at their end: a thread that ends this process when what started it is gone."""
    parent, above = os.getppid(), launchers()

    def watch() -> None:
        while not orphaned(parent, above):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_noted() -> Iterator[list[str]]:
    """SIGTERM, SIGUSR1 and SIGINT add their name to a list instead of doing what they did; as before afterwards. A second SIGINT ends at
    once. For training in the process of a command, in its main thread."""
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
    """Set by SIGTERM, SIGUSR1 or SIGINT, by the file RUN/STOP, or when the launcher above this process has died."""

    def __init__(self, stop_file: Path):
        self.stop_file = stop_file
        self.reason, self.since = "", 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._orchestrator = os.environ.get(PARENT_ENV)
        self._parent, self._launchers = os.getppid(), launchers()
        threading.Thread(target=self._watch, daemon=True).start()

    def note(self, reason: str) -> None:
        """Stop, for this reason if it is the first."""
        if not self.reason:
            self.since, self.reason = time.monotonic(), reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note(signal.Signals(number).name)

    def _watch(self) -> None:
        while not self.reason:
            if orphaned(self._parent, self._launchers):
                self.note("the launcher has died")
            if self._orchestrator and process_identity(int(self._orchestrator.split(":")[0])) != self._orchestrator:
                self.note("the process that started this run has died")
            if self.stop_file.exists():
                self.note("asked to stop")
            time.sleep(0.5)
