"""What this process may use of the machine; no torch here."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees, for its next allocation. It gives blocks of over 32 MiB back at once, and the system clears
    every page of the next one; the float32 decoder at 256 pixels, whose maps have 42 MB, loses 8 percent of its time so. Nothing where
    the C library is another."""
    trim_threshold, mmap_max = -1, -4  # of mallopt, malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
