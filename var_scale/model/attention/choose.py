"""The choice of an attention back-end: by its name, or by the device and the call with `auto`."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from var_scale.errors import UserError
from var_scale.model.attention.base import Backend, Call, KVCache
from var_scale.model.attention.biased import Attention, Biased, Flash, sdpa, xformers
from var_scale.model.attention.blocks import SHORTEST, Blocks
from var_scale.model.attention.dense import LONGEST, Dense
from var_scale.model.attention.flex import Flex
from var_scale.model.attention.mask import ScaleMask
from var_scale.model.attention.triton import Triton

TRITON, BLOCKS, DENSE, SDPA = Triton(), Blocks(), Dense(), Biased("sdpa", sdpa)
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        TRITON,
        Flex(),
        BLOCKS,
        DENSE,
        SDPA,
        Flash(),
        Biased("xformers", xformers, "xformers"),
    )
}
AUTOMATIC: tuple[Backend, ...] = (TRITON, BLOCKS, DENSE, SDPA)
"""what `auto` chooses from: the first that is preferable for a call"""


def register_backend(name: str, attention: Attention) -> None:
    """Add a back-end, which `build_var(attention=name)` then accepts. `attention` maps q, k, v (B,
    H, L, D), a bias (1, 1, L, L) or None, and the scale to (B, H, L, D)."""
    BACKENDS[name] = Biased(name, attention)


def backend_name(name: str) -> str:
    """`name`, checked.

    Raises:
        UserError: code `model.attention` for an unknown back-end, `model.attention-package` for one
            whose package is not installed.
    """
    if name == "auto":
        return name
    if name not in BACKENDS:
        raise UserError(
            f"attention back-end {name!r} is unknown; use one of auto, {', '.join(BACKENDS)}, or "
            "add it with register_backend",
            code="model.attention",
        )
    package = BACKENDS[name].package
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"attention back-end {name!r} needs {package}, which is not installed; run pip install "
            f"{package.replace('_', '-')} on a Linux machine with an NVIDIA GPU, or use auto",
            code="model.attention-package",
        )
    return name


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """The back-end that runs on `device`, and the reason.

    Raises:
        UserError: code `model.attention` if `name` is not `auto` and cannot run there.
    """
    if name != "auto":
        if obstacle := BACKENDS[name].runs_on(device):
            raise UserError(
                f"attention={name}: {obstacle}; use auto or sdpa", code="model.attention"
            )
        return name, "chosen explicitly"
    obstacle = TRITON.runs_on(device)
    if not obstacle:
        return "triton", "the fused kernels run on this GPU"
    if not BLOCKS.runs_on(device):
        return (
            f"blocks in half precision from {SHORTEST} tokens on, dense in float32 up to "
            f"{LONGEST} tokens, else sdpa",
            obstacle,
        )
    return "sdpa", obstacle


def require_trainable(name: str, device: torch.device) -> None:
    """Check that a back-end can train on `device`, before any work.

    Raises:
        UserError: code `model.attention` or `model.attention-package`.
    """
    choose_backend(backend_name(name), device)
    if name != "auto" and (obstacle := BACKENDS[name].trains_on(device)):
        raise UserError(f"attention={name}: {obstacle}", code="model.attention")


def _automatic(call: Call) -> Backend:
    """The back-end that `auto` means for a call; sdpa, the last, computes every call."""
    return next(backend for backend in AUTOMATIC if backend.preferable(call))


def attend(
    qkv_BL3HD: Tensor,
    mask: Tensor | ScaleMask | None,
    log_scale_H: Tensor | None,
    scale: float,
    backend: str,
    cache: KVCache | None,
) -> Tensor:
    """Self-attention of packed q, k, v by the back-end of this name: (B, L, H D). See `Call`.

    Raises:
        UserError: code `model.attention` if the back-end cannot compute this call.
    """
    call = Call(qkv_BL3HD, mask, log_scale_H, scale, cache)
    chosen = _automatic(call) if backend == "auto" else BACKENDS[backend]
    if obstacle := chosen.supports(call):
        raise UserError(f"attention={chosen.name}: {obstacle}", code="model.attention")
    return chosen(call)
