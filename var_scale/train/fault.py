"""Faults on request, for the tests of everything that can go wrong in a run.

`VAR_SCALE_FAULT=rank:step:kind[,rank:step:kind...]`. `rank` is a rank or `*`. `step` is the number
of an optimiser step as in metrics.jsonl (from 1), `evalN` for the N-th batch of an evaluation, or
`*`. A fault with a number fires once in a process, one with `*` at every step. Kinds:

    inf        multiply the loss by infinity
    scale=K    multiply the loss by K
    sleep=S    sleep S seconds after the forward pass
    slow-data=S  sleep S seconds before a batch is read
    stop, kill, usr1, term  send SIGSTOP, SIGKILL, SIGUSR1 or SIGTERM to this process
    raise      raise a RuntimeError

Every fault that fires appends a line to RUN/log/faults.jsonl, so that a test can check that it did.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from var_scale.errors import UserError

FAULT_ENV = "VAR_SCALE_FAULT"
SIGNALS = {
    "stop": signal.SIGSTOP,
    "kill": signal.SIGKILL,
    "usr1": signal.SIGUSR1,
    "term": signal.SIGTERM,
}
KINDS = ("inf", "scale", "sleep", "slow-data", "raise", *SIGNALS)


@dataclass
class Fault:
    """One fault of this rank."""

    step: str
    kind: str
    value: float
    fired: bool = False


class Faults:
    """The faults of one rank. `Faults.of` returns None if none is requested, which costs
    nothing."""

    def __init__(self, faults: list[Fault], rank: int, record: Path):
        self.faults, self.rank, self.record = faults, rank, record
        self.evaluated = 0

    @staticmethod
    def of(rank: int, record: Path) -> Faults | None:
        """The faults that the environment requests for this rank.

        Raises:
            UserError: the variable is malformed.
        """
        found = []
        for text in filter(None, os.environ.get(FAULT_ENV, "").split(",")):
            parts = text.split(":")
            kind, _, value = parts[-1].partition("=")
            if len(parts) != 3 or kind not in KINDS:
                raise UserError(
                    f"{FAULT_ENV}: {text!r} is not rank:step:kind with a kind of "
                    f"{', '.join(KINDS)}",
                    code="train.fault-malformed",
                )
            if parts[0] in ("*", str(rank)):
                found.append(Fault(parts[1], kind, float(value or "nan")))
        return Faults(found, rank, record) if found else None

    def before_data(self, step: int) -> None:
        """Called before a batch of optimiser step `step` (from 1) is read."""
        for fault in self._due(str(step), data=True):
            time.sleep(fault.value)

    def after_forward(self, step: int, loss: Tensor) -> Tensor:
        """Called after a forward pass of optimiser step `step` (from 1); returns the loss to
        use."""
        for fault in self._due(str(step), data=False):
            if fault.kind in ("inf", "scale"):
                loss = loss * (float("inf") if fault.kind == "inf" else fault.value)
            else:
                self._act(fault)
        return loss

    def in_evaluation(self) -> None:
        """Called before every batch of an evaluation."""
        self.evaluated += 1
        for fault in self._due(f"eval{self.evaluated}", data=False):
            self._act(fault)

    def _due(self, step: str, data: bool) -> list[Fault]:
        """The faults for this place, of reading data or of the rest; each is recorded once."""
        evaluation = step.startswith("eval")
        due = [
            fault
            for fault in self.faults
            if (fault.kind == "slow-data") == data
            and ((fault.step == "*" and not evaluation) or (fault.step == step and not fault.fired))
        ]
        for fault in due:
            if not fault.fired:
                self._note(fault, step)
            fault.fired = True
        return due

    def _note(self, fault: Fault, step: str) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        row = {"rank": self.rank, "step": step, "kind": fault.kind}
        with open(self.record, "a") as file:  # one short write: lines of several ranks do not mix
            file.write(json.dumps(row) + "\n")

    def _act(self, fault: Fault) -> None:
        if fault.kind == "sleep":
            time.sleep(fault.value)
        elif fault.kind == "raise":
            raise RuntimeError("a fault requested by " + FAULT_ENV)
        else:
            os.kill(os.getpid(), SIGNALS[fault.kind])
