"""Several small runs at the same time on this machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from var_scale.config.schema import Config
from var_scale.errors import Preempted
from var_scale.jobs.local import launch_environment, train_here
from var_scale.jobs.nursery import Nursery
from var_scale.run_folder import RunFolder
from var_scale.train.create import create_run

Job = tuple[Config, RunFolder, str]
"""A run and its label."""


def train_together(jobs: Sequence[Job], lanes: int, after: Callable[[], None]) -> None:
    """Train runs in their order, `lanes` at a time; `after` is called when some have ended.

    A run that diverges does not stop the others. Ctrl-C, SIGTERM or a run that fails stop those
    that train: they save first.

    Raises:
        Preempted: the runs were stopped after they saved.
        UserError: a run failed.
    """
    if not jobs:
        return
    # The nursery ends with the runs.
    nursery = Nursery(launch_environment(jobs[0][0]))
    with ThreadPoolExecutor(lanes, "lane") as pool, contextlib.closing(nursery):
        futures = {pool.submit(_train, *job, nursery): job[1] for job in jobs}
        try:
            left = set(futures)
            while left:
                done, left = wait(left, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if done:
                    after()
        except BaseException as error:
            stopped = _stop(futures)
            if isinstance(error, KeyboardInterrupt | SystemExit) and stopped:
                raise Preempted from None
            raise


def _train(config: Config, run: RunFolder, label: str, nursery: Nursery) -> None:
    create_run(config, run.path)
    train_here(config, run, label, may_diverge=True, nursery=nursery)


def _stop(futures: dict[Future[None], RunFolder]) -> bool:
    """Request a stop of the runs that train and wait for them; returns whether all have saved."""
    running = {future: run for future, run in futures.items() if not future.cancel()}
    running = {future: run for future, run in running.items() if not future.done()}
    while left := [run for future, run in running.items() if not future.done()]:
        for run in left:  # repeatedly, because a run that starts removes the file
            with contextlib.suppress(FileNotFoundError):  # its folder is not created yet
                (run.path / "STOP").touch()
        time.sleep(0.2)
    return bool(running) and all(run.status()["state"] == "preempted" for run in running.values())
