"""Where the Triton kernels run, and what else the operators share."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")

MINIMUM_CAPABILITY = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""the kernels run in Triton's interpreter: tests without a GPU"""


@torch.compiler.assume_constant_result
def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on `device`; empty when they can. With VAR_KERNELS_INTERPRET=1 and TRITON_INTERPRET=1 they run anywhere,
    very slowly: for tests of what is built on them. A compiler takes the answer as a constant."""
    return _why_not(device)


@lru_cache(maxsize=16)
def _why_not(device: torch.device) -> str:
    if INTERPRETED and os.environ.get("VAR_KERNELS_INTERPRET") == "1":
        return ""
    if device.type != "cuda" or torch.version.hip:
        return f"the kernels need an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0 (Ampere), {name} has {torch.cuda.get_device_capability(device)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return ""


def use_triton(x: Tensor) -> bool:
    """Whether the operators run as Triton kernels for `x`; otherwise (also for float64 and for nothing) in their PyTorch form."""
    return x.dtype != torch.float64 and x.numel() > 0 and not why_not(x.device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 where there is none (tests in the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launches(function: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make it that of the first tensor."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        with torch.cuda.device_of(first) if isinstance(first, Tensor) and first.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return wrapper


def require(condition: bool, message: str, *values: Any) -> None:
    """ValueError unless the arguments of an operator fit: the kernels themselves would read past their ends. `values` fill the message."""
    if not condition:
        raise ValueError(message.format(*(tuple(v) if isinstance(v, torch.Size) else v for v in values)))


def eager(
    forward: Callable[..., tuple[Tensor, ...]], save: Callable[..., None], backward: Callable[..., tuple[Any, ...]], differentiable: int = 1
) -> Callable[..., tuple[Tensor, ...]]:
    """An operator's autograd function for eager calls, past the dispatcher and its overhead.

    `forward(*inputs)` gives all outputs, of which the first `differentiable` have gradients; `save(ctx, inputs, outputs)` and
    `backward(ctx, *gradients)` are as torch.library.register_autograd takes them.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            save(ctx, inputs, output)
            ctx.mark_non_differentiable(*output[differentiable:])
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
            return backward(ctx, *gradients)

    return Function.apply


@lru_cache(maxsize=16)
def generation(device: torch.device) -> int:
    """Major compute capability: 8 Ampere and Ada, 9 Hopper, 10 Blackwell; 9 where there is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type matrix products run in: autocast's when it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
