"""The problems of the benchmark: each operator at a shape, its floor, and the forms to compare."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_kernels import (
    adaptive_layer_norm,
    block_attention,
    cached_attention,
    gate_adaptive_layer_norm,
    gelu_mlp,
    linear_cross_entropy,
    nearest_code,
)
from var_kernels.attention import mask, scales
from var_kernels.attention.schedule import OFFICIAL_SCALES

PATCHES = {**OFFICIAL_SCALES, 30: (1, 2, 3, 4)}


@dataclass(frozen=True)
class Shape:
    """The width C of a model with heads of 64 channels, at batch B and L tokens."""

    name: str
    C: int
    B: int
    L: int
    V: int = 4096

    @property
    def heads(self) -> int:
        return self.C // 64


SHAPES = [
    *(Shape(f"d{d} B={B} L=680", 64 * d, B, 680) for d in (16, 24, 30) for B in (32, 96)),
    *(Shape(f"d{d} B=8 L=2240", 64 * d, 8, 2240) for d in (16, 24, 30, 36)),
]
TRY = [Shape("try", 128, 2, 30, 256)]
"""A shape that tests the benchmark itself on a machine without a GPU."""


OPERATORS = [
    "adaptive_layer_norm",
    "gate_adaptive_layer_norm",
    "block_attention",
    "cached_attention",
    "gelu_mlp",
    "linear_cross_entropy",
    "nearest_code",
]


@dataclass
class Problem:
    """One operator at one shape. All forms take `inputs` and return the differentiable outputs."""

    name: str
    shape: Shape
    inputs: list[Tensor]
    gradients: list[Tensor]
    forms: dict[str, Callable[..., Any]]
    bytes: tuple[float, float] = (0.0, 0.0)
    """The floor of the memory traffic in bytes, forward and backward."""
    flops: tuple[float, float] = (0.0, 0.0)
    """The useful FLOPs, forward and backward."""
    serial: bool = False
    """Whether matrix products and memory passes run one after the other, so that their floors add
    up. Otherwise the larger floor counts."""
    parts: tuple[str, ...] = ()
    """The forms that are only a part of the operator: they are timed but not compared."""


def problems(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Problem]:
    """Yield all operators at a shape, with random inputs."""

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_()

    B, L, C, H = shape.B, shape.L, shape.C, shape.heads
    n, half = B * L * C, dtype.itemsize
    ada = torch.randn(B, 6, C, device=device).to(dtype)
    gamma, scale, shift = (ada[:, i].detach().requires_grad_() for i in (0, 2, 4))
    grad = torch.randn(B, L, C, device=device).to(dtype)

    def eager_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (
            F.layer_norm(x.float(), (C,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        ).to(x.dtype)

    def eager_gate(
        x: Tensor, y: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + y * gamma.unsqueeze(1)
        return x, eager_norm(x, scale, shift)

    yield Problem(
        "adaptive_layer_norm",
        shape,
        [randn(B, L, C), scale, shift],
        [grad],
        compete(eager_norm, adaptive_layer_norm, device),
        bytes=(2 * n * half, 3 * n * half),
        flops=(10 * n, 20 * n),
    )
    yield Problem(
        "gate_adaptive_layer_norm",
        shape,
        [randn(B, L, C), randn(B, L, C), gamma, scale, shift],
        [grad, grad.clone()],
        compete(eager_gate, gate_adaptive_layer_norm, device),
        bytes=(4 * n * half, 6 * n * half),
        flops=(12 * n, 24 * n),
    )

    yield _cached_attention(shape, dtype, device)
    yield _attention(
        shape,
        randn(B, L, 3, H, 64),
        torch.full((H,), math.log(4.0), device=device, requires_grad=True),
        grad,
    )

    hidden = 4 * C
    weights = [
        randn(hidden, C, scale=C**-0.5),
        randn(hidden),
        randn(C, hidden, scale=hidden**-0.5),
        randn(C),
    ]

    def eager_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    def products(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return x @ w1.t() @ w2.t()

    yield Problem(
        "gelu_mlp",
        shape,
        [randn(B, L, C), *weights],
        [grad],
        compete(eager_mlp, gelu_mlp, device) | {"products": products},
        parts=("products",),
        bytes=((6 * n + 2 * C * hidden) * half, (7 * n + 4 * C * hidden) * half),
        flops=(4 * n * hidden, 8 * n * hidden),
    )

    N, V = B * L, shape.V
    target = torch.randint(V, (N,), device=device)

    def eager_ce(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b).float(), target, reduction="none")

    def fused_ce(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, b, target)[0]

    yield Problem(
        "linear_cross_entropy",
        shape,
        [randn(N, C), randn(V, C, scale=C**-0.5), randn(V)],
        [torch.full((N,), 1 / N, device=device)],
        compete(eager_ce, fused_ce, device) | _public_ce(target),
        bytes=(2 * N * V * half, 0),
        flops=(2 * N * V * C, 4 * N * V * C),
        serial=True,
    )

    codes = torch.randn(4096, 32, device=device)
    vectors = torch.randn(N, 32, device=device)

    def eager_vq(z: Tensor, c: Tensor) -> Tensor:
        return (c.square().sum(1) - 2 * z @ c.t()).argmin(1)

    # The search is exact in float32, for which no floor is defined.
    yield Problem(
        "nearest_code", shape, [vectors, codes], [], compete(eager_vq, nearest_code, device)
    )


def compete(
    eager: Callable[..., Any], ours: Callable[..., Any], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Return the forms: eager PyTorch, torch.compile of it (on GPUs), and our operator."""
    compiled = {"compile": torch.compile(eager, dynamic=False)} if device.type == "cuda" else {}
    return {"eager": eager, **compiled, "ours": ours}


def _public_ce(target: Tensor) -> dict[str, Callable[..., Any]]:
    """Return the forms of the installed libraries.

    They are Liger's fused linear cross-entropy, and quack's cross-entropy after a matrix product.
    """
    forms: dict[str, Callable[..., Any]] = {}
    if target.is_cuda and importlib.util.find_spec("liger_kernel"):

        def liger(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            from liger_kernel.ops.fused_linear_cross_entropy import (
                LigerFusedLinearCrossEntropyFunction,
            )

            return LigerFusedLinearCrossEntropyFunction.apply(
                x, w, target, b, None, -100, 0.0, 0.0, "none"
            )[0]

        forms["liger"] = liger
    if target.is_cuda and importlib.util.find_spec("quack"):

        def quack(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            from quack.cross_entropy import cross_entropy

            return cross_entropy(F.linear(x, w, b), target, reduction="none", inplace_backward=True)

        forms["quack"] = quack
    return forms


def _cached_attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the problem of the queries of the last scale over all keys, without a gradient.

    This is the most expensive step of sampling.
    """
    last = PATCHES[shape.L][-1] ** 2
    q, k, v = (
        torch.randn(shape.B, n, shape.heads, 64, device=device).to(dtype)
        for n in (last, shape.L, shape.L)
    )

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), scale=0.125
        ).transpose(1, 2)

    forms = compete(eager, lambda q, k, v: cached_attention(q, k, v, 0.125), device)
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        forms["flash-attn"] = lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=0.125)
    useful = 4 * shape.B * shape.heads * 64 * last * shape.L
    moved = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    return Problem(
        "cached_attention", shape, [q, k, v], [], forms, bytes=(moved, 0), flops=(useful, 0)
    )


def _attention(shape: Shape, qkv: Tensor, log_scale: Tensor, grad: Tensor) -> Problem:
    """Return the problem of block-causal attention with L2 norms.

    Its forms are sdpa with a mask, the compiled sdpa, our operator, FlexAttention, and xformers and
    flash-attn where they are installed.
    """
    patch_nums = PATCHES[shape.L]
    visible = scales(patch_nums)
    seen = mask(visible, qkv.device)

    def normed(qkv: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        q = F.normalize(q.float(), dim=-1) * log_scale.clamp_max(math.log(100)).exp().view(
            1, -1, 1, 1
        )
        return q.to(v.dtype), F.normalize(k.float(), dim=-1).to(v.dtype), v

    def eager(qkv: Tensor, log_scale: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*normed(qkv, log_scale), attn_mask=seen, scale=1.0)
        return out.transpose(1, 2).flatten(2)

    forms = compete(
        eager, lambda qkv, log_scale: block_attention(qkv, patch_nums, log_scale), qkv.device
    )
    if qkv.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        hi = torch.tensor(visible.hi, device=qkv.device)
        for block in (64, 128):
            blocks = create_block_mask(
                lambda b, h, i, j: j < hi[i],
                None,
                None,
                shape.L,
                shape.L,
                device="cuda",
                BLOCK_SIZE=block,
            )

            def flex(qkv: Tensor, log_scale: Tensor, blocks: Any = blocks) -> Tensor:
                return (
                    flex_attention(*normed(qkv, log_scale), block_mask=blocks, scale=1.0)
                    .transpose(1, 2)
                    .flatten(2)
                )  # type: ignore[union-attr]

            # On Hopper only the autotuner finds a backward kernel for blocks of 64.
            mode = {64: "max-autotune-no-cudagraphs"}.get(block)
            forms[f"flex {block}"] = torch.compile(flex, dynamic=False, mode=mode)
    if qkv.is_cuda and importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        def xformers(qkv: Tensor, log_scale: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in normed(qkv, log_scale))
            bias = torch.zeros_like(seen, dtype=v.dtype).masked_fill_(~seen, -math.inf)
            return memory_efficient_attention(
                q, k, v, attn_bias=bias.expand(shape.B, shape.heads, -1, -1), scale=1.0
            ).flatten(2)

        forms["xformers"] = xformers
    if qkv.is_cuda and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        ends = [sum(side * side for side in patch_nums[: k + 1]) for k in range(len(patch_nums))]

        # flash-attn does not support this mask: one call without a mask runs per scale.
        def flash(qkv: Tensor, log_scale: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in normed(qkv, log_scale))
            parts = zip([0, *ends], ends, strict=False)
            return torch.cat(
                [
                    flash_attn_func(q[:, a:b], k[:, :b], v[:, :b], softmax_scale=1.0)
                    for a, b in parts
                ],
                1,
            ).flatten(2)

        forms["flash-attn"] = flash
    useful = 4 * shape.B * shape.heads * 64 * visible.pairs()
    moved = qkv.numel() * qkv.element_size()
    return Problem(
        "block_attention",
        shape,
        [qkv, log_scale],
        [grad],
        forms,
        bytes=(4 / 3 * moved, 8 / 3 * moved),
        flops=(useful, 2.5 * useful),
    )
