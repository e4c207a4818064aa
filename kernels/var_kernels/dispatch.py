"""The decision where the Triton kernels can run, and functions that all operators share."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")

MINIMUM_CAPABILITY = (8, 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, as they do in tests without a GPU."""


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function whose result is a constant for torch.compile.

    `torch.compiler.assume_constant_result` sets the same mark and nothing else. It would import
    torch's compiler, which costs 1.3 CPU seconds in every program that imports these operators.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def why_not(device: torch.device) -> str:
    """Return the reason why the kernels cannot run on `device`, or "" if they can.

    With VAR_KERNELS_INTERPRET=1 and TRITON_INTERPRET=1 they run on every device, but very slowly.
    This is for tests of the code that uses the kernels.
    """
    return _why_not(device)


@lru_cache(maxsize=16)
def _why_not(device: torch.device) -> str:
    if INTERPRETED and os.environ.get("VAR_KERNELS_INTERPRET") == "1":
        return ""
    if device.type != "cuda" or torch.version.hip:
        return f"the kernels need an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        found = torch.cuda.get_device_capability(device)
        return f"the kernels need compute capability 8.0 (Ampere), but {name} has {found}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with: pip install triton"
    return ""


def use_triton(x: Tensor) -> bool:
    """Return whether the operators run as Triton kernels for `x`.

    Otherwise they run in their PyTorch form. This includes float64 and empty tensors.
    """
    return x.dtype != torch.float64 and x.numel() > 0 and not why_not(x.device)


@dataclass(frozen=True)
class Hardware:
    """What the launch settings depend on."""

    generation: int
    """The major compute capability: 8 for Ampere and Ada, 9 for Hopper, 10 for Blackwell."""
    multiprocessors: int
    """The number of streaming multiprocessors."""


STAND_IN = Hardware(generation=9, multiprocessors=4)
"""The hardware of a device that is not a GPU: in the interpreter, and while launches are recorded
(`var_kernels.aot`)."""


@lru_cache(maxsize=16)
def _gpu(device: torch.device) -> Hardware:
    properties = torch.cuda.get_device_properties(device)
    return Hardware(properties.major, properties.multi_processor_count)


def hardware(device: torch.device) -> Hardware:
    """Return the hardware of a GPU, or the stand-in for another device."""
    return _gpu(device) if device.type == "cuda" else STAND_IN


def multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors."""
    return hardware(device).multiprocessors


def generation(device: torch.device) -> int:
    """Return the major compute capability."""
    return hardware(device).generation


def launches(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function launch its kernels on the device of its first tensor.

    Triton itself uses the current device.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        with (
            torch.cuda.device_of(first)
            if isinstance(first, Tensor) and first.is_cuda
            else contextlib.nullcontext()
        ):
            return function(*args, **kwargs)

    return wrapper


def require(condition: bool, message: str, *values: Any) -> None:
    """Raise ValueError unless the arguments of an operator fit.

    The kernels themselves do not check the shapes: they would read past the ends of the tensors.
    `values` fill the placeholders of the message.
    """
    if not condition:
        raise ValueError(
            message.format(*(tuple(v) if isinstance(v, torch.Size) else v for v in values))
        )


def eager(
    forward: Callable[..., tuple[Tensor, ...]],
    save: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    differentiable: int = 1,
) -> Callable[..., tuple[Tensor, ...]]:
    """Return an autograd function of an operator for eager calls.

    It avoids the overhead of the dispatcher.

    `forward(*inputs)` returns all outputs, of which the first `differentiable` have gradients.
    `save(ctx, inputs, outputs)` and `backward(ctx, *gradients)` are the functions that
    torch.library.register_autograd takes.
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


def precision(dtype: torch.dtype) -> str:
    """Return the precision of tl.dot: float32 is exact unless torch allows TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: that of autocast if it is enabled, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
