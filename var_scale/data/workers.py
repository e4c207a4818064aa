"""Worker processes for reading, drawing and writing images: numpy and Pillow only, no torch inside."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.pool import Pool


def worker_pool(processes: int) -> Pool:
    """A pool of forked workers; Ctrl-C and SIGTERM are the parent's affair, which ends them."""
    return multiprocessing.get_context("fork").Pool(processes, _begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
