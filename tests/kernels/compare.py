"""The comparison of an operator with float64.

The error of an operator may be at most twice that of the same composition in PyTorch at the same
precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device of the tests. Without a GPU the kernels run in Triton's interpreter."""
ROOM = {
    torch.float32: 1e-6 if torch.cuda.is_available() else 3e-7,
    torch.bfloat16: 6e-3,
    torch.float16: 8e-4,
    torch.float64: 1e-12,
}
"""The relative error that is always allowed, which is up to three roundings of the result. GPUs
approximate exp2 and divisions of float32."""
INTERPRETER_ROUNDING = {torch.bfloat16: 2.0}
"""The error of Triton's interpreter relative to that of a GPU. The interpreter truncates float32 to
bfloat16 instead of rounding it, which doubles the error."""

DTYPES = [
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
]
"""The data types of the tests. float16 takes the same path as bfloat16, except for one branch in
attention that fast cases cover."""

Tensors = Sequence[torch.Tensor]


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |value - exact| / |exact| in the 2-norm."""
    size = float(exact.double().norm())
    return float((value.double() - exact.double()).norm()) / (size or 1.0)


def run(function: Callable[..., Any], inputs: Tensors, gradients: Tensors) -> list[torch.Tensor]:
    """Return the outputs, then the gradients of all inputs that are not integers."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [t for t in leaves if t.requires_grad]
    grads = [g.to(o.dtype) for o, g in zip(outs, gradients, strict=False)]
    return [*outs, *torch.autograd.grad(outs[: len(grads)], wanted, grads)]


def check(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Tensors,
    gradients: Tensors,
    eager: Callable[..., Any] | None = None,
    sums: Sequence[int] = (),
) -> None:
    """Check the forward and backward passes against the reference in float64.

    On a GPU a second run must give the same bits. The interpreter has one order of computation:
    there, new tensors are filled with nan, so that reading them before they are written shows.

    The yardstick is `eager` (by default the reference) at the
    precision of the inputs. `sums` lists the indices of results with few elements, each of which is
    a sum whose terms cancel. Their relative errors, ours and the yardstick's, depend on chance, so
    that ten times the error is allowed.
    """
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    try:
        first = run(ours, inputs, gradients)
    finally:
        torch.use_deterministic_algorithms(False)
    if DEVICE == "cuda":
        second = run(ours, inputs, gradients)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    yardstick = run(eager or reference, inputs, gradients)
    exact = run(
        reference,
        [t.double() if t.is_floating_point() else t for t in inputs],
        [g.double() for g in gradients],
    )
    for number, (value, same, truth) in enumerate(zip(first, yardstick, exact, strict=True)):
        assert value.shape == truth.shape and torch.isfinite(value).all(), f"result {number}"
        if not value.is_floating_point():
            continue
        factor = (10 if number in sums else 1) * (
            INTERPRETER_ROUNDING.get(inputs[0].dtype, 1.0) if DEVICE == "cpu" else 1.0
        )
        error, allowed = (
            relative(value, truth),
            factor * max(2 * relative(same, truth), ROOM[inputs[0].dtype]),
        )
        assert error <= allowed, f"result {number}: error {error:.2e}, allowed {allowed:.2e}"


def eager_attention(
    qkv: torch.Tensor, log_scale: torch.Tensor | None, seen: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Attention as a model without the kernels computes it, at the precision of its input: norms in
    float32, then PyTorch's attention with a mask."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    if log_scale is not None:
        factor = log_scale.clamp_max(math.log(100)).exp().view(1, -1, 1, 1)
        q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
        k, scale = F.normalize(k.float(), dim=-1).to(v.dtype), 1.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.transpose(1, 2).flatten(2)
