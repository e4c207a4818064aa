"""Every kernel as the official models launch it, for `var_kernels.aot`.

The cases are recorded, not listed: the functions that launch the kernels run on tensors without
memory (the meta device), and every launch that they make is one case, with its data types, strides,
constants, warps and stages. So a launch and its case cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from var_kernels import dispatch

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
KNOWN_STACK = {"attention.backward_keys float16": 288, "attention.forward bfloat16 D=128": 8}
"""Bytes of spills that are known, by the beginning of the name of a case. float16 spills 40 bytes
on sm_90 and 288 on sm_100, and heads of 128 channels spill 8 bytes on sm_100."""

Call = tuple[str, Callable[[], object]]
"""A label, and a call that launches kernels."""


def specialised(value: Any) -> tuple[str, bool]:
    """Return the type of an argument as Triton names it, and whether Triton may assume that it is a
    multiple of 16, as its launches do. Triton also takes None and 1 as constants."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True  # torch's allocator aligns all tensors
    if isinstance(value, int):
        return "i32", value % 16 == 0
    assert isinstance(value, float), value
    return "fp32", False


@dataclass(frozen=True)
class Specialisation:
    """What one compiled kernel depends on, in the form of triton.compiler.ASTSource."""

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


@dataclass(frozen=True)
class Case:
    """One launch of one kernel."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    """The arguments by name; the tensors have no memory."""
    options: dict[str, Any]
    """Those of OPTIONS that the launch sets."""

    @property
    def matrix(self) -> bool:
        """Whether the kernel has to use tensor cores.

        Products of float32 are exact, without them. With heads of 128 channels Triton uses mma
        instead of wgmma on Hopper.
        """
        if self.name.startswith("vq."):
            return True
        wide = self.arguments.get("D") == 128 or " float32" in self.name
        return self.name.startswith(("attention.forward", "attention.backward")) and not wide

    def specialisation(self) -> Specialisation:
        """Return what Triton specialises the kernel for in this launch."""
        found = Specialisation({}, {}, {})
        for number, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                found.signature[parameter.name] = "constexpr"
                found.constants[number,] = value
                continue
            types = []
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                place = (number, i) if isinstance(value, tuple) else (number,)
                kind, aligned = specialised(part)
                types.append(kind)
                if kind == "constexpr":
                    found.constants[place] = part
                if aligned:
                    found.attributes[place] = [["tt.divisibility", 16]]
            whole = tuple(types) if isinstance(value, tuple) else types[0]
            found.signature[parameter.name] = whole
        return found

    @property
    def stack(self) -> int:
        """Bytes of spills that are known."""
        return next((n for start, n in KNOWN_STACK.items() if self.name.startswith(start)), 0)


def cases(architecture: str) -> Iterator[Case]:
    """Yield the launches of `calls` on an architecture, each machine code once."""
    stand_in = dispatch.STAND_IN
    dispatch.STAND_IN = dispatch.Hardware(
        int(architecture.removeprefix("sm_")) // 10, MULTIPROCESSORS[architecture]
    )
    seen = set()
    try:
        for label, call in calls():
            with recorded() as launches:
                call()
            for kernel, arguments in launches:
                name = f"{kernel.fn.__module__.split('.')[1]}.{kernel.fn.__name__}"
                options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
                case = Case(f"{name} {label}", kernel, arguments, options)
                key = repr((name, case.specialisation(), options))
                if key not in seen:
                    seen.add(key)
                    yield case
    finally:
        dispatch.STAND_IN = stand_in


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Record the launches of Triton kernels, as (kernel, arguments by name), instead of making
    them."""
    from triton.runtime import JITFunction

    launches: list[tuple[Any, dict[str, Any]]] = []
    original = JITFunction.run

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append((self, dict(zip(self.arg_names, given, strict=False)) | named))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(*size, dtype=dtype, device="meta")


def calls() -> Iterator[Call]:
    """Yield calls at the sizes of d16, d24, d30 and d36, with their labels.

    The data type is bfloat16 unless the label states otherwise.
    """
    yield from adaln()
    yield from attention()
    yield from cross_entropy()
    yield from mlp()
    yield from group_norm()
    yield from vq()


def adaln() -> Iterator[Call]:
    """Yield the passes with a gate; without one for the first block; a float32 residual stream; and
    the widest row."""
    bf16 = torch.bfloat16
    for C in (1024, 1536, 1920, 2304):
        yield f"C={C}", partial(_adaln, C, bf16, True)
        yield f"C={C} no gate", partial(_adaln, C, bf16, False)
    yield "C=2304 float32", partial(_adaln, 2304, torch.float32, True)
    yield "C=4096", partial(_adaln, 4096, bf16, True)


def _adaln(C: int, dtype: torch.dtype, gated: bool) -> None:
    from var_kernels.adaln import launch

    x, y, dh = (random(32, 680, C, dtype=dtype) for _ in range(3))
    gamma, scale, shift = random(32, 6, C, dtype=dtype).unbind(1)[:3]
    mean, rstd = (random(32 * 680, dtype=torch.float32) for _ in range(2))
    keep = random(32, dtype=torch.float32)
    gate: list[Tensor | None] = [y, gamma, keep] if gated else [None] * 3
    launch.launch_forward(x, gate[0], gate[1], gate[2], scale, shift, 1e-6, dtype)
    launch.launch_backward(dh, x, x, gate[0], gate[1], gate[2], scale, dtype, mean, rstd)


def attention() -> Iterator[Call]:
    """Yield training at 256 and 512 pixels, other data types, wide heads, and sampling, whose keys
    are normalised when they enter the cache."""
    for kind, D, L in (
        (torch.bfloat16, 64, 680),
        (torch.bfloat16, 64, 2240),
        (torch.float16, 64, 680),
        (torch.float32, 64, 680),
        (torch.bfloat16, 128, 680),
    ):
        # The data type comes first: KNOWN_STACK reads it there.
        label = f"{str(kind).removeprefix('torch.')} D={D} L={L}"
        yield label, partial(_attention, kind, D, L, True)
        if D == 64 and kind == torch.bfloat16:
            yield f"{label} no norm", partial(_attention, kind, D, L, False)
    yield "bfloat16 D=64 cache", partial(_sampling, True)
    yield "bfloat16 D=64 cache no norm", partial(_sampling, False)


def _attention(dtype: torch.dtype, D: int, L: int, norm: bool) -> None:
    from var_kernels.attention import launch
    from var_kernels.attention.schedule import OFFICIAL_SCALES, scales

    qkv, gradient = (random(32, L, 3, 16, D, dtype=dtype) for _ in range(2))
    log_scale = random(16, dtype=torch.float32) if norm else None
    (q, k, v), visible = launch.split(qkv), scales(OFFICIAL_SCALES[L])
    out = launch.launch_forward(q, k, v, log_scale, visible, 1.0)
    dq, dk, dv = launch.split(gradient)
    launch.launch_backward(out[0], q, k, v, *out, log_scale, visible, 1.0, dq, dk, dv)


def _sampling(norm: bool) -> None:
    from var_kernels.attention import launch
    from var_kernels.attention.schedule import everything

    cache = random(2, 32, 16, 680, 64)
    log_scale = random(16, dtype=torch.float32) if norm else None
    q = launch.launch_append(random(32, 256, 3, 16, 64), cache, 424, log_scale)
    k, v = cache.transpose(2, 3).unbind(0)
    launch.launch_forward(q, k, v, None, everything(256, 680), 1.0)


def cross_entropy() -> Iterator[Call]:
    """Yield the official vocabulary and the largest one."""
    from var_kernels.cross_entropy import op

    target = random(21760, dtype=torch.int64)
    for V in (4096, 16384):
        yield f"V={V}", partial(op.launch, random(21760, V), target, 0.1, 0.0, True)
    factor = random(21760, dtype=torch.float32)
    yield "C=1920", partial(op.scale_rows, random(21760, 1920), factor)


def mlp() -> Iterator[Call]:
    """Yield both passes of the GELU."""
    from var_kernels.mlp import op

    h, da = random(21760, 7680), random(21760, 7680)
    yield "C=1920", partial(op.gelu, h)
    yield "C=1920", partial(op.gelu_backward, da, h, True)


def group_norm() -> Iterator[Call]:
    """Yield the widest maps of the decoder."""
    from var_kernels.group_norm import op

    x = random(8, 640, 16, 16).to(memory_format=torch.channels_last)
    w = random(640)
    yield "C=640", partial(op.launch, x, w, w, 32, 1e-6, True)


def vq() -> Iterator[Call]:
    """Yield both precisions of the search."""
    from var_kernels.vq import config, op

    z, codes = random(21760, 32, dtype=torch.float32), random(4096, 32, dtype=torch.float32)
    for precision in config.PRECISIONS:
        yield precision, partial(op.launch, z, codes, precision)
