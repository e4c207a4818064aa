"""A run that hangs ends, and says which rank keeps the others waiting."""

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
from var_scale.train.world import World

PHASES = ("start", "data", "forward", "backward", "optimiser", "exchange", "log", "evaluate", "save", "end")
STORE_SECONDS = 5.0
NO_STORE = "the store at rank 0 does not answer: rank 0 hangs, or its node is gone"
START_SECONDS = 1800.0
"""least patience before the first step is done: reading, building and compiling take their time"""


class Watchdog:
    """Every rank tells where it is (`beat`). A thread passes that on through the rendezvous store; when nothing moves for `seconds`, it
    compares the ranks, writes who is behind to status.json and every rank's stack to log/, and ends the process."""

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
        """Watch no longer."""
        self.over = True

    def _connect(self) -> dist.Store | None:
        """A connection of its own: the main thread may be waiting in the other one."""
        if self.world.size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=STORE_SECONDS))

    def _watch(self) -> None:
        while not self.over:
            if self.store:
                with contextlib.suppress(RuntimeError):  # rank 0 may be the one that is gone; said when the time is over
                    self.store.set(f"beat/{self.world.rank}", f"{self.at[0]} {self.at[1]} {time.time()}")
            time.sleep(self.period)
            limit = self.seconds if self.running else max(self.seconds, START_SECONDS)
            if not self.over and time.monotonic() - self.since > limit:
                self._end()

    def _end(self) -> None:
        end = threading.Timer(2 * self.period + 2 * STORE_SECONDS, os._exit, (EXIT_HUNG,))  # whatever happens to store and disk below
        end.daemon = True
        end.start()
        who = [NO_STORE]
        asking = threading.Thread(target=lambda: who.insert(0, self._who()), daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        reason = f"no progress for {time.monotonic() - self.since:.0f} s at step {self.at[0]}: {who[0]}"
        print(f"error: rank {self.world.rank}: {reason}", flush=True)
        with contextlib.suppress(UserError, OSError):
            self.folder.log.mkdir(parents=True, exist_ok=True)
            with open(self.folder.log / f"hang-rank-{self.world.rank}.txt", "w") as file:
                file.write(f"rank {self.world.rank}: {reason}\n")
                faulthandler.dump_traceback(file)
            if self.folder.status()["state"] != "failed":
                self.folder.set_status("failed", f"{reason}; stacks in {self.folder.log}", step=self.at[0])
        time.sleep(self.period)  # the other ranks write their stacks too
        sys.stdout.flush()
        os._exit(EXIT_HUNG)

    def _who(self) -> str:
        """Ranks that do not answer, else those behind, else where all wait."""
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
        silent = [rank for rank in range(self.world.size) if rank not in seen or seen[rank][2] > 2.5 * self.period]
        if silent:
            last = {rank: f", last heard of {ago:.0f} s ago in {phase} of step {step}" for rank, (step, phase, ago) in seen.items()}
            return "; ".join(f"rank {rank} does not answer{last.get(rank, '')}" for rank in silent)
        furthest = max((step, PHASES.index(phase)) for step, phase, _ in seen.values())
        behind = [rank for rank, (step, phase, _) in seen.items() if (step, PHASES.index(phase)) < furthest]
        if behind:
            return "; ".join(f"rank {rank} is in {seen[rank][1]} of step {seen[rank][0]}" for rank in behind) + (
                f", others wait in {PHASES[furthest[1]]} of step {furthest[0]}"
            )
        return f"all ranks wait in {PHASES[furthest[1]]}; the network or a driver hangs"
