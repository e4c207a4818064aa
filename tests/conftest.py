"""Shared settings of all tests: one thread a process, so that two cores are not fought over."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu") if not os.path.exists("/dev/nvidiactl") else None

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch on one thread in this process."""
    import torch

    torch.set_num_threads(1)
