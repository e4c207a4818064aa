"""The processor and the GPUs of this machine, and what this process may use of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files of the drivers of NVIDIA, of Windows' Linux subsystem, and of AMD."""


def has_gpu_driver() -> bool:
    """Whether this machine may have a GPU. Without a driver nothing has to ask torch, whose import
    takes seconds."""
    return any(Path(name).exists() for name in GPU_DEVICES)


def gpu_count() -> int:
    """Number of GPUs that this process may use."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()
