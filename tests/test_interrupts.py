"""Signals that come in the middle of an import."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

import pytest

from var_scale.interrupts import signals_interrupt

SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.2)
    complete = True
except BaseException:
    complete = False
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_waits_for_the_end_of_an_import(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is imported as a whole, and the command is interrupted right after."""
    (tmp_path / f"swallows_{name}.py").write_text(SWALLOWS.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        module = importlib.import_module(f"swallows_{name}")
        assert module.complete


def test_a_signal_in_a_callback_is_not_lost() -> None:
    """Python ignores the exceptions of `__del__`; the interruption follows a moment later."""

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    reached = False
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        Swallows()
        reached = True
        signal.sigtimedwait([], 5)
    assert reached


def test_a_signal_elsewhere_interrupts_at_once_and_the_handlers_return() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
