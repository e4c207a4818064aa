"""Signals that end a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RETRY_SECONDS = 0.02


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within this context SIGINT, SIGTERM and SIGUSR1 raise KeyboardInterrupt in the main thread.

    Python raises it wherever the main thread is, and two of these places lose it: an import, where
    a module tries one back-end after the other or stays imported in part, and a callback or
    `__del__`, whose exceptions are ignored. There the signal is taken again a moment later.
    """
    pending = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                again()
                return
            frame = frame.f_back
        pending = False
        raise KeyboardInterrupt

    def again() -> None:
        nonlocal pending
        pending = True
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    def ignored(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is KeyboardInterrupt:
            again()
        else:
            hook(lost)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    before.append((signal.SIGALRM, signal.getsignal(signal.SIGALRM)))
    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        yield
        if pending:
            raise KeyboardInterrupt
    finally:
        if pending:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before:
            signal.signal(number, handler)
