"""Ends a run that hangs, and names the rank that keeps the others waiting."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time

import torch.distributed as dist

from var_scale.errors import UserError
from var_scale.run_folder import EXIT_HUNG, RunFolder
from var_scale.train import stepper
from var_scale.train.world import World

PHASES = ("start", *stepper.PHASES, "exchange", "log", "evaluate", "save", "end")
"""Where a rank can be, in the order of a step: of two ranks in one step the earlier is behind."""
STORE_SECONDS = 5.0
"""Time-out of a request to the store."""
NO_STORE = "the store at rank 0 does not answer: rank 0 hangs, or its node failed"
START_SECONDS = 1800.0
"""Minimum patience before the first step ends: reading, building and compiling take time."""


class Watchdog:
    """Every rank reports where it is (`beat`), and a thread publishes this through the rendezvous
    store. If a rank makes no progress for `seconds`, the thread compares the ranks, writes which
    are behind to status.json and the stack of every rank to log/, and ends the process."""

    def __init__(self, folder: RunFolder, world: World, seconds: float):
        self.folder, self.world, self.seconds = folder, world, seconds
        self.period = min(10.0, seconds / 4)
        self.at, self.since = (0, "start"), time.monotonic()
        self.running = False
        self.store, self.over = self._connect(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        """This rank begins `phase` of optimiser step `step`."""
        self.at, self.since = (step, phase), time.monotonic()
        self.running = self.running or phase == "optimiser"

    def close(self) -> None:
        """Stop watching."""
        self.over = True

    def _connect(self) -> dist.Store | None:
        """A separate connection: the main thread may be waiting in the other one."""
        if self.world.size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=STORE_SECONDS),
        )

    def _watch(self) -> None:
        """The thread: publish where this rank is, and end it when it makes no progress."""
        while not self.over:
            if self.store:
                # Rank 0 may be the rank that failed; that is reported when the time is over.
                with contextlib.suppress(RuntimeError):
                    place = f"{self.at[0]} {self.at[1]} {time.time()}"
                    self.store.set(f"beat/{self.world.rank}", place)
            time.sleep(self.period)
            limit = self.seconds if self.running else max(self.seconds, START_SECONDS)
            if not self.over and time.monotonic() - self.since > limit:
                self._end()

    def _end(self) -> None:
        """Record which ranks are behind and the stack of this one, and end the process."""
        # Ends this process whatever happens to the store and the disk below.
        end = threading.Timer(2 * self.period + 2 * STORE_SECONDS, os._exit, (EXIT_HUNG,))
        end.daemon = True
        end.start()
        who = [NO_STORE]
        asking = threading.Thread(target=lambda: who.insert(0, self._who()), daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        reason = (
            f"no progress for {time.monotonic() - self.since:.0f} s at step {self.at[0]}: {who[0]}"
        )
        print(f"error: rank {self.world.rank}: {reason}", flush=True)
        with contextlib.suppress(UserError, OSError):
            self.folder.log.mkdir(parents=True, exist_ok=True)
            with open(self.folder.log / f"hang-rank-{self.world.rank}.txt", "w") as file:
                file.write(f"rank {self.world.rank}: {reason}\n")
                faulthandler.dump_traceback(file)
            if self.folder.status()["state"] != "failed":
                reason = f"{reason}; stacks are in {self.folder.log}"
                self.folder.set_status("failed", reason, cause="hung", step=self.at[0])
        time.sleep(self.period)  # the other ranks write their stacks too
        sys.stdout.flush()
        os._exit(EXIT_HUNG)

    def _who(self) -> str:
        """The ranks that do not answer, otherwise those behind, otherwise where all wait."""
        if self.store is None:
            return f"waiting in {self.at[1]}"
        seen: dict[int, tuple[int, str, float]] = {}
        for rank in range(self.world.size):
            try:
                if self.store.check([f"beat/{rank}"]):
                    step, phase, moment = self.store.get(f"beat/{rank}").decode().split()
                    seen[rank] = (int(step), phase, time.time() - float(moment))
            except RuntimeError:
                return NO_STORE
        silent = [
            rank
            for rank in range(self.world.size)
            if rank not in seen or seen[rank][2] > 2.5 * self.period
        ]
        if silent:
            last = {
                rank: f", last seen {ago:.0f} s ago in {phase} of step {step}"
                for rank, (step, phase, ago) in seen.items()
            }
            return "; ".join(f"rank {rank} does not answer{last.get(rank, '')}" for rank in silent)
        furthest = max((step, PHASES.index(phase)) for step, phase, _ in seen.values())
        behind = [
            rank
            for rank, (step, phase, _) in seen.items()
            if (step, PHASES.index(phase)) < furthest
        ]
        if behind:
            return "; ".join(
                f"rank {rank} is in {seen[rank][1]} of step {seen[rank][0]}" for rank in behind
            ) + (f", others wait in {PHASES[furthest[1]]} of step {furthest[0]}")
        return f"all ranks wait in {PHASES[furthest[1]]}; the network or a driver hangs"
