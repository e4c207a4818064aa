"""The faster forms of operations on CPUs agree with the public ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from var_scale.model import cpu as module
from var_scale.model.cpu import (
    Linear,
    NormalisedHeads,
    linear,
    onednn,
    softmax_backward,
    softmax_backward_public,
    writes_out,
)
from var_scale.model.networks import Upsample


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 * 2**-8)]
)
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 7, 24), (5, 24)])
def test_linear(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    gelu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN's linear and, where it is missing, torch's. bfloat16 may round the product before it
    adds the bias, so twice."""
    x, weight, bias = (
        torch.randn(shape).to(dtype),
        torch.randn(10, 24).to(dtype),
        torch.randn(10).to(dtype),
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    plain = F.linear
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(args) or plain(*args))
    for found_missing in (False, True):
        if found_missing:
            monkeypatch.setattr(module, "onednn", lambda dtype: None)
        calls: list[object] = []
        with torch.no_grad():
            # Also where x is not contiguous.
            y = linear(x.transpose(0, -1).contiguous().transpose(0, -1), weight, bias, gelu)
        assert len(calls) == (module.onednn(dtype) is None)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 10)
        assert ((y.double() - expected).abs().max() / expected.abs().max()).item() < (
            tolerance if not gelu else 2 * tolerance
        )


def test_linear_where_it_must_be_the_plain_one() -> None:
    assert onednn(torch.float64) is None and onednn(torch.float16) is None
    layer, x = Linear(6, 4), torch.randn(3, 6)
    layer(x, gelu=True).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(
            layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalised_heads(dtype: torch.dtype) -> None:
    """The same bits as F.normalize and a product, and its gradients, also of vectors near zero, at
    most twice as far from float64 as those of autograd."""
    qkv = torch.randn(2, 7, 3, 5, 8, dtype=torch.float64)
    qkv[0, 0, 0, 0], qkv[1, 2, 1, 3], qkv[1, 3, 0, 2] = 0, 0, 1e-14 * qkv[1, 3, 0, 2]
    factor = torch.rand(5, dtype=torch.float64) + 1
    grads = [torch.randn(2, 5, 7, 8, dtype=torch.float64) for _ in range(3)]

    def plain(qkv: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1) * factor.view(-1, 1, 1), F.normalize(k, dim=-1)
        return q, k, v

    def run(form: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> tuple[Any, Any]:
        leaves = [t.to(dtype).requires_grad_() for t in (qkv, factor)]
        heads = form(*leaves)
        return heads, torch.autograd.grad(heads, leaves, [g.to(dtype) for g in grads])

    (heads, ours), (expected, auto), (_, exact) = (
        run(NormalisedHeads.apply, dtype),
        run(plain, dtype),
        run(plain, torch.float64),
    )
    for a, b in zip(heads, expected, strict=True):
        assert torch.equal(a, b)
    for a, b, c in zip(ours, auto, exact, strict=True):
        # The gradient of a zero vector is 1e12 times that of the heads: compare it by itself.
        zero = c.abs() > 1e6
        for part in (zero, ~zero):
            a1, b1, c1 = (t.double()[part] for t in (a, b, c))
            room = {torch.float64: 1e-14, torch.float32: 1e-6}[dtype] * float(c1.norm())
            assert float((a1 - c1).norm()) <= max(2 * float((b1 - c1).norm()), room)


@pytest.mark.parametrize("shape", [(1, 1, 3, 2, 8), (3, 1, 2, 5, 8)])
def test_normalised_heads_leave_their_input(shape: tuple[int, ...]) -> None:
    """Also where the order of the heads is that of the memory already."""
    qkv = torch.randn(shape)
    if shape[0] == 3:
        qkv = qkv.permute(1, 3, 0, 2, 4)
    before = qkv.clone()
    NormalisedHeads.apply(qkv, torch.full((qkv.shape[3],), 2.0))
    assert torch.equal(qkv, before)


def test_where_the_backward_pass_is_written_out() -> None:
    """Not without gradients, not in half precision and not under autocast."""
    x = torch.zeros(1)
    assert writes_out(x) and writes_out(x.double()) and not writes_out(x.bfloat16())
    with torch.no_grad():
        assert not writes_out(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not writes_out(x)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
def test_softmax_backward(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private operator, the public form, and autograd in float64 agree."""
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 7, dtype=torch.float64).to(dtype)
    p = logits.softmax(-1)
    (exact,) = torch.autograd.grad(p, logits, grad.double())
    assert hasattr(torch.ops.aten, "_softmax_backward_data")
    for function in (softmax_backward, softmax_backward_public):
        found = function(grad, p.detach().to(dtype))
        assert found.dtype == dtype
        assert float((found.double() - exact).abs().max()) < 2 * tolerance * float(grad.abs().max())
    monkeypatch.delattr(module, "softmax_backward_public")
    softmax_backward(grad, p.detach().to(dtype))  # takes the operator, not the public form


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_by_sums_of_weights(memory_format: torch.memory_format) -> None:
    up = Upsample(6).double().to(memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    with_gradients = up(x)
    with torch.no_grad():
        without = up(x)
    assert with_gradients.requires_grad and without.shape == (2, 6, 10, 6)
    torch.testing.assert_close(without, with_gradients.detach(), rtol=1e-12, atol=1e-12)
    assert not torch.equal(without, with_gradients)  # it is another way, not the same
