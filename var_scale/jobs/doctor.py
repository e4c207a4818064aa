"""`var-scale doctor`: what this machine has, and what each missing piece means."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from rich.console import Console
from rich.table import Table

NVIDIA = "on a machine with an NVIDIA GPU"
OPTIONAL = {
    "triton": "the fused kernels need it on NVIDIA GPUs; elsewhere nothing uses it",
    "flash-attn": f"attention=flash (sampling) needs it: pip install flash-attn, {NVIDIA}",
    "xformers": f"attention=xformers needs it: pip install xformers, {NVIDIA}",
}


def doctor() -> None:
    """Print one table. A missing piece is shown in it and never makes the command fail."""
    table = Table(title="var-scale doctor", show_header=False)
    for row in (*_machine(), *_choices(), *_packages(), *_surroundings()):
        table.add_row(*row)
    Console().print(table)


def _machine() -> list[tuple[str, str, str]]:
    """Rows of Python, processor, memory and GPUs: name, what was found, note."""
    import torch

    from var_scale.machine import cores, processor_name

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    old = "" if sys.version_info >= (3, 11) else "3.11 or newer is needed"
    little = "" if memory >= 6 else "the embedded study needs 6 GiB"
    rows = [
        ("python", sys.version.split()[0], old),
        ("processor", f"{processor_name()}, {cores()} cores", ""),
        ("memory", f"{memory:.0f} GiB", little),
        *(
            ("GPU", f"{g.name}, {g.total_memory / 2**30:.0f} GiB", f"sm_{g.major}{g.minor}")
            for g in gpus
        ),
    ]
    without = "training on the processor suits the embedded study, not ImageNet"
    return rows if gpus else [*rows, ("GPU", "none", without)]


def _choices() -> list[tuple[str, str, str]]:
    """Rows of what `auto` means on this machine."""
    import torch

    from var_kernels import why_not
    from var_scale.model.attention import choose_backend
    from var_scale.train.world import choose_precision, fast_bf16

    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    fast = "fast here" if fast_bf16(device) else "not fast here, float32 is used"
    backend, why = choose_backend("auto", device)
    network = "nccl" if device.type == "cuda" else "gloo"
    return [
        ("precision auto", choose_precision("auto", device), f"bf16 matrix products are {fast}"),
        ("engines", "single ddp fsdp deepspeed", network),
        ("attention auto", backend, why),
        ("attention others", "sdpa flex", "flex trains on GPUs only"),
        ("fused kernels", "off" if why_not(device) else "on", why_not(device)),
    ]


def _packages() -> list[tuple[str, str, str]]:
    """Rows of Python packages."""
    from var_scale.train.telemetry import package_versions

    return [
        (name, version or "missing", "" if version else OPTIONAL.get(name, "reinstall var-scale"))
        for name, version in package_versions().items()
    ]


def _surroundings() -> list[tuple[str, str, str]]:
    """Rows of what lies outside of Python."""
    compiler = shutil.which("g++") or shutil.which("c++")
    without = "" if shutil.which("sbatch") else "studies run on this machine only"
    disk = shutil.disk_usage(".").free / 2**30
    return [
        ("compiler", compiler or "none", "the embedded study does not need one"),
        ("SLURM", _slurm(), without),
        (
            "free disk here",
            f"{disk:.0f} GiB",
            "" if disk > 2 else "the embedded study writes about 0.3 GiB",
        ),
    ]


def _slurm() -> str:
    """The version of sbatch, or none."""
    if not shutil.which("sbatch"):
        return "none"
    try:
        return subprocess.run(
            ["sbatch", "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"installed, but not working ({error})"
