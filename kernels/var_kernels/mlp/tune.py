"""Which form of the MLP's inner part runs: around the vendor's products, or inside our own. A measurement on the device decides, once.

The choice is written down (a file in the user's cache folder) and never made on the fly: two runs on one machine, or a run and its
continuation, take the same form and give the same bits. Without a measurement it is the vendor's. VAR_KERNELS_MLP overrides it.
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
"""our products are taken where they need less than this share of the vendor's time: a tie is not worth another form"""


def cache_file() -> Path:
    """Where choices are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "var-scale" / "mlp.json"


def key(device: torch.device, dtype: torch.dtype, C: int, hidden: int, rows: int) -> str:
    """What a measurement holds for: the device, the versions, the type, the widths, and the tokens to the next power of two."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, {dtype}, {C} x {hidden}, {1 << (rows - 1).bit_length()} rows"


@lru_cache(maxsize=1)
def _measured() -> dict[str, Any]:
    path = cache_file()
    return json.loads(path.read_text()) if path.exists() else {}


@lru_cache(maxsize=256)
def choice(device: torch.device, dtype: torch.dtype, C: int, hidden: int, rows: int) -> str:
    """vendor or triton. ValueError for another VAR_KERNELS_MLP."""
    asked = os.environ.get("VAR_KERNELS_MLP")
    if asked is not None:
        if asked not in CHOICES:
            raise ValueError(f"VAR_KERNELS_MLP={asked!r} is not known; take one of {', '.join(CHOICES)}")
        return asked
    return str(_measured().get(key(device, dtype, C, hidden, rows), {}).get("choice", "vendor"))


def summary() -> str:
    """Where the form comes from, for a run's record."""
    if "VAR_KERNELS_MLP" in os.environ:
        return f"{os.environ['VAR_KERNELS_MLP']} (VAR_KERNELS_MLP)"
    kept = {entry["choice"] for entry in _measured().values()}
    return f"{' or '.join(sorted(kept))} by width ({cache_file()})" if kept else "vendor"


def decide(times: dict[str, float]) -> str:
    """The form for these milliseconds."""
    return "triton" if times["triton"] < MARGIN * times["vendor"] else "vendor"


def tune(run: Callable[[str], Callable[[], object]], device: torch.device, dtype: torch.dtype, C: int, hidden: int, rows: int,
         time: Callable[[Callable[[], object]], float]) -> dict[str, Any]:  # fmt: skip
    """Time forward and backward in both forms and write the choice down. `run(form)` gives a call to time, `time` its milliseconds."""
    times = {form: time(run(form)) for form in CHOICES}
    entry = {"choice": decide(times), "milliseconds": times}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = (json.loads(path.read_text()) if path.exists() else {}) | {key(device, dtype, C, hidden, rows): entry}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(everything, indent=1) + "\n")
    os.replace(temporary, path)
    _measured.cache_clear()
    choice.cache_clear()
    return entry
