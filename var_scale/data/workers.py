"""Worker processes for reading, drawing and writing images, without torch."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from var_scale.errors import UserError

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_workers(
    function: Callable[[Job], Result], jobs: Iterable[Job], processes: int, ordered: bool = False
) -> Iterator[Result]:
    """Results of `function` over `jobs`, from forked processes that work a few jobs ahead.

    Results come as they finish, or in the order of the jobs. The parent handles Ctrl-C and SIGTERM:
    when it stops iterating, the workers end.

    Raises:
        UserError: the system killed a worker.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin)
    waiting: deque[Future[Any]] = deque()
    source = iter(jobs)
    try:
        while True:
            while len(waiting) < 3 * processes and (job := next(source, waiting)) is not waiting:
                waiting.append(pool.submit(function, job))  # type: ignore[arg-type]
            if not waiting:
                return
            first = (
                waiting[0]
                if ordered
                else next(iter(wait(waiting, return_when=FIRST_COMPLETED).done))
            )
            waiting.remove(first)
            yield first.result()
    except BrokenProcessPool:
        raise UserError(
            "the system killed a worker process (out of memory?); use fewer --processes, or run "
            "the same command again, it continues",
            code="data.worker-killed",
        ) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


def _begin() -> None:
    # A killed parent leaves no workers behind, nor the locks that they inherited.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Such as Pillow's about EXIF data. Printing could also deadlock on the parent's locked stream.
    warnings.simplefilter("ignore")
