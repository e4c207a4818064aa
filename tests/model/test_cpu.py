"""The faster forms of operations on CPUs agree with the public ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from var_scale.model import cpu as module
from var_scale.model.cpu import Linear, linear, onednn, softmax_backward, softmax_backward_public
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
