"""The choice between the two forms of the inner part of the MLP.

The GELU runs either between the vendor's matrix products or inside our own. One measurement on the
device decides. The choice is stored in a file in the user's cache folder and is never made during a
run: two runs on one machine, or a run and its continuation, use the same form and give the same
bits. Without a measurement, the vendor's products run. The variable VAR_KERNELS_MLP overrides the
choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CHOICES = ("vendor", "triton")
MARGIN = 0.98
"""Our products are chosen where they need less than this share of the vendor's time. A tie is not
worth a second form."""


def cache_file() -> Path:
    """Return the path of the file that stores the choices."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "var-scale" / "mlp.json"


def key(device: torch.device, dtype: torch.dtype, C: int, hidden: int, rows: int) -> str:
    """Return the conditions that a measurement is valid for.

    They are the device, the versions, the data type, the widths, and the number of tokens rounded
    up to a power of two.
    """
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, {dtype}, {C} x {hidden}, "
        f"{1 << (rows - 1).bit_length()} rows"
    )


@lru_cache(maxsize=1)
def _measured() -> dict[str, Any]:
    path = cache_file()
    return json.loads(path.read_text()) if path.exists() else {}


@lru_cache(maxsize=256)
def choice(device: torch.device, dtype: torch.dtype, C: int, hidden: int, rows: int) -> str:
    """Return "vendor" or "triton".

    Raises ValueError if VAR_KERNELS_MLP has another value.
    """
    asked = os.environ.get("VAR_KERNELS_MLP")
    if asked is not None:
        if asked not in CHOICES:
            raise ValueError(
                f"VAR_KERNELS_MLP={asked!r} is not known; use one of {', '.join(CHOICES)}"
            )
        return asked
    return str(_measured().get(key(device, dtype, C, hidden, rows), {}).get("choice", "vendor"))


def summary() -> str:
    """Describe the form and where it comes from, for the record of a run."""
    if "VAR_KERNELS_MLP" in os.environ:
        return f"{os.environ['VAR_KERNELS_MLP']} (VAR_KERNELS_MLP)"
    kept = {entry["choice"] for entry in _measured().values()}
    return f"{' or '.join(sorted(kept))} by width ({cache_file()})" if kept else "vendor"


def decide(times: dict[str, float]) -> str:
    """Return the form to use, given the milliseconds of each."""
    return "triton" if times["triton"] < MARGIN * times["vendor"] else "vendor"


def tune(
    run: Callable[[str], Callable[[], object]],
    device: torch.device,
    dtype: torch.dtype,
    C: int,
    hidden: int,
    rows: int,
    time: Callable[[Callable[[], object]], float],
) -> dict[str, Any]:
    """Time the forward and backward passes in both forms and store the choice.

    `run(form)` returns the call to time, and `time` returns its milliseconds.
    """
    times = {form: time(run(form)) for form in CHOICES}
    entry = {"choice": decide(times), "milliseconds": times}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = (json.loads(path.read_text()) if path.exists() else {}) | {
        key(device, dtype, C, hidden, rows): entry
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(everything, indent=1) + "\n")
    os.replace(temporary, path)
    _measured.cache_clear()
    choice.cache_clear()
    return entry
