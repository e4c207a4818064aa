"""When to stop: a signal, a STOP file in the run folder, or the death of the process that started this one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

PARENT_ENV = "VAR_SCALE_PARENT"  # "pid:start time" of the orchestrating process


def process_identity(pid: int) -> str | None:
    """pid:start-time, so that a reused pid is not mistaken; None when the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{pid}:{fields[19]}"


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT, by the file RUN/STOP, or when the launcher above this process has died."""

    def __init__(self, stop_file: Path):
        self.stop_file = stop_file
        self.reason = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._orchestrator = os.environ.get(PARENT_ENV)
        self._parent = os.getppid()
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _watch(self) -> None:
        while not self.reason:
            if os.getppid() != self._parent:
                self.reason = "the launcher has died"
            if self._orchestrator and process_identity(int(self._orchestrator.split(":")[0])) != self._orchestrator:
                self.reason = "the process that started this run has died"
            if self.stop_file.exists():
                self.reason = "asked to stop"
            time.sleep(0.5)
