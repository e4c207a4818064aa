"""Comparing an operator with float64: its error may be at most twice that of the same composition in PyTorch at the same precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""without a GPU the kernels run in Triton's interpreter"""
ROOM = {torch.float32: 1e-6 if torch.cuda.is_available() else 3e-7, torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float64: 1e-12}
"""relative error that is allowed in any case: up to three roundings of the result; GPUs approximate exp2 and divisions of float32"""
INTERPRETER_ROUNDING = {torch.bfloat16: 2.0}
"""Triton's interpreter cuts float32 to bfloat16 instead of rounding it, twice the error of the GPU"""

Tensors = Sequence[torch.Tensor]


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """|value - exact| / |exact| in the 2-norm."""
    size = float(exact.double().norm())
    return float((value.double() - exact.double()).norm()) / (size or 1.0)


def run(function: Callable[..., Any], inputs: Tensors, gradients: Tensors) -> list[torch.Tensor]:
    """Outputs, then the gradients of all inputs that are not integers."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [t for t in leaves if t.requires_grad]
    grads = [g.to(o.dtype) for o, g in zip(outs, gradients, strict=False)]
    return [*outs, *torch.autograd.grad(outs[: len(grads)], wanted, grads)]


def check(
    ours: Callable[..., Any], reference: Callable[..., Any], inputs: Tensors, gradients: Tensors, eager: Callable[..., Any] | None = None,
    sums: Sequence[int] = (),
) -> None:  # fmt: skip
    """Forward and backward against the reference in float64, with `eager` (default: the reference) at the inputs' own precision as the
    yardstick; and the same bits when it runs again. Results in `sums` are few numbers, each a sum whose terms cancel: their relative
    error is luck, ours and the yardstick's, and gets ten times the room."""
    first, second = run(ours, inputs, gradients), run(ours, inputs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    yardstick = run(eager or reference, inputs, gradients)
    exact = run(reference, [t.double() if t.is_floating_point() else t for t in inputs], [g.double() for g in gradients])
    for number, (value, same, truth) in enumerate(zip(first, yardstick, exact, strict=True)):
        assert value.shape == truth.shape and torch.isfinite(value).all(), f"result {number}"
        if not value.is_floating_point():
            continue
        factor = (10 if number in sums else 1) * (INTERPRETER_ROUNDING.get(inputs[0].dtype, 1.0) if DEVICE == "cpu" else 1.0)
        error, allowed = relative(value, truth), factor * max(2 * relative(same, truth), ROOM[inputs[0].dtype])
        assert error <= allowed, f"result {number}: error {error:.2e}, allowed {allowed:.2e}"
