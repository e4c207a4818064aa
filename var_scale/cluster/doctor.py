"""`var-scale doctor`: what this machine has, and what each missing piece costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from rich.console import Console
from rich.table import Table

OPTIONAL = {
    "triton": "the fused kernels need it, on NVIDIA GPUs; elsewhere it costs nothing",
    "flash-attn": "back-end attention=flash (sampling) is missing: pip install flash-attn, on a machine with an NVIDIA GPU",
    "xformers": "back-end attention=xformers is missing: pip install xformers, on a machine with an NVIDIA GPU",
}


def doctor() -> None:
    """Print one table. Never fails because something is missing: it says so."""
    import torch

    from var_kernels import why_not
    from var_scale.machine import processor_name
    from var_scale.model.attention import choose_backend
    from var_scale.train.telemetry import package_versions
    from var_scale.train.world import choose_precision, fast_bf16

    table = Table(title="var-scale doctor", show_header=False)
    table.add_column("what")
    table.add_column("found")
    table.add_column("note")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    device = torch.device("cuda" if gpus else "cpu")
    table.add_row("python", sys.version.split()[0], "" if sys.version_info >= (3, 11) else "3.11 or newer is needed")
    table.add_row("processor", f"{processor_name()}, {len(os.sched_getaffinity(0))} cores", "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    table.add_row("memory", f"{memory:.0f} GiB", "" if memory >= 6 else "the embedded study wants 6 GiB")
    for gpu in gpus:
        table.add_row("GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", f"sm_{gpu.major}{gpu.minor}")
    if not gpus:
        table.add_row("GPU", "none", "training runs on the processor with gloo: right for the embedded study, not for ImageNet")
    fast = "fast here" if fast_bf16(device) else "not fast here, float32 is used"
    table.add_row("precision auto", choose_precision("auto", device), f"bf16 matrix products are {fast}")
    table.add_row("engines", "single ddp fsdp deepspeed", "nccl" if gpus else "gloo")
    backend, why = choose_backend("auto", device)
    table.add_row("attention auto", backend, why)
    table.add_row("attention others", "sdpa flex", "flex trains on GPUs only")
    table.add_row("fused kernels", "off" if why_not(device) else "on", why_not(device))
    for name, version in package_versions().items():
        table.add_row(name, version or "missing", "" if version else OPTIONAL.get(name, "pip install var-scale again"))
    compiler = shutil.which("g++") or shutil.which("c++")
    table.add_row("compiler", compiler or "none", "not needed by the embedded study")
    table.add_row("SLURM", _slurm(), "" if shutil.which("sbatch") else "studies run on this machine only")
    disk = shutil.disk_usage(".").free / 2**30
    table.add_row("free disk here", f"{disk:.0f} GiB", "" if disk > 2 else "the embedded study writes about 0.3 GiB")
    Console().print(table)


def _slurm() -> str:
    """sbatch's version, or none."""
    if not shutil.which("sbatch"):
        return "none"
    try:
        return subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"installed but not working ({error})"
