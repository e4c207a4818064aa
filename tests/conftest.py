"""Shared settings of all tests: one thread a process, so that two cores are not fought over."""

from __future__ import annotations

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so in children, when started in the background of a shell
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/kernels; read when a kernel is defined

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch on one thread in this process."""
    import torch

    torch.set_num_threads(1)
