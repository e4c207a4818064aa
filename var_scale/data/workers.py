"""Worker processes for reading, drawing and writing images: numpy and Pillow only, no torch inside."""

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

PR_SET_PDEATHSIG = 1  # Linux: the signal a process gets when its parent dies
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_workers(function: Callable[[Job], Result], jobs: Iterable[Job], processes: int, ordered: bool = False) -> Iterator[Result]:
    """Results of `function` over `jobs`, in forked processes, a few jobs ahead; as they come, or in the order of the jobs.

    UserError when the system ends a worker. Ctrl-C and SIGTERM are the parent's affair: when it stops asking, the workers end.
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
            first = waiting[0] if ordered else next(iter(wait(waiting, return_when=FIRST_COMPLETED).done))
            waiting.remove(first)
            yield first.result()
    except BrokenProcessPool:
        raise UserError("a worker process was ended by the system (out of memory?); use fewer --processes, or run the same command again, "
                        "it continues") from None  # fmt: skip
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


def _begin() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed leaves none behind, nor the locks they inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # such as Pillow's about EXIF data; also, the parent's terminal may be locked in this copy
