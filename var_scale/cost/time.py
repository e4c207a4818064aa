"""Expected time on a device: its peak from the data sheet, its utilisation assumed or measured."""

from __future__ import annotations

from dataclasses import dataclass

from var_scale.errors import UserError


@dataclass(frozen=True)
class Device:
    """A processor: its dense bf16 peak in FLOP/s, and the fraction that training is ASSUMED to
    reach (MFU)."""

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
    """Dense bf16 FLOP/s of the device with this driver name, from its data sheet.

    None for CPUs, for devices that are not in the table, and for float32, which runs on other
    units.
    """
    known = [device.peak for key, device in DEVICES.items() if key != "cpu" and key in name.lower()]
    return known[0] if known and precision != "fp32" else None


def find_device(name: str) -> Device:
    """The device of a name such as h100.

    Raises:
        UserError: code `cost.device`.
    """
    if name.lower() not in DEVICES:
        raise UserError(
            f"device {name!r} is unknown; use one of {', '.join(DEVICES)}", code="cost.device"
        )
    return DEVICES[name.lower()]


def seconds(flops: float, device: str = "h100", count: int = 1, mfu: float | None = None) -> float:
    """Expected seconds: flops / (count x peak x MFU).

    Args:
        count: number of devices.
        mfu: fraction of the peak that is reached, in place of the assumed one.

    Raises:
        UserError: codes `cost.argument` and `cost.device`.
    """
    if count < 1 or (mfu is not None and not 0 < mfu <= 1):
        raise UserError(
            f"time: {count} devices and MFU {mfu}; give at least one device and an MFU in (0, 1]",
            code="cost.argument",
        )
    row = find_device(device)
    return flops / (count * row.peak * (mfu if mfu is not None else row.assumed_mfu))
