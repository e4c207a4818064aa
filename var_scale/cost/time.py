"""Expected time of work on a device: peak from the data sheet, utilisation assumed until measured."""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.errors import UserError


@dataclass(frozen=True)
class Device:
    """A processor: dense bf16 peak in FLOP/s (data sheet) and the share of it that training is ASSUMED to reach (MFU)."""

    name: str
    peak: float
    assumed_mfu: float
    memory: int
    """bytes"""


GIB = 1 << 30
DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 989e12, 0.40, 80 * GIB),
    "h200": Device("NVIDIA H200 SXM", 989e12, 0.40, 141 * GIB),
    "a100": Device("NVIDIA A100 80 GB", 312e12, 0.40, 80 * GIB),
    "cpu": Device("one CPU core, float32", 5e10, 0.40, 8 * GIB),
}


def peak_of(name: str, precision: str = "bf16") -> float | None:
    """Dense FLOP/s of a device by the name its driver gives it, from the data sheet; None for one that is not in the table, for a CPU, and
    for float32, which runs on other units."""
    known = [device.peak for key, device in DEVICES.items() if key != "cpu" and key in name.lower()]
    return known[0] if known and precision != "fp32" else None


def find_device(name: str) -> Device:
    """The table's row for a name such as h100; an unknown one is an error that lists the known."""
    if name.lower() not in DEVICES:
        raise UserError(f"device {name!r} is not in the table; use one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def seconds(flops: float, device: str = "h100", count: int = 1, mfu: float | None = None) -> float:
    """flops / (count x peak x MFU). `mfu` replaces the assumed share of the peak by a measured one."""
    if count < 1 or (mfu is not None and not 0 < mfu <= 1):
        raise UserError(f"time: {count} devices and MFU {mfu}; give at least one device and an MFU in (0, 1]")
    row = find_device(device)
    return flops / (count * row.peak * (mfu if mfu is not None else row.assumed_mfu))
