"""What runs otherwise on CPUs without gradients: the same numbers, and never with gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from var_scale.model import linear as module
from var_scale.model.linear import Linear, linear, onednn
from var_scale.model.networks import Upsample


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2 * 2**-8)])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 7, 24), (5, 24)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, gelu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 may round the product before it adds the bias, so twice."""
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(10, 24).to(dtype), torch.randn(10).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    plain = F.linear
    monkeypatch.setattr(module.F, "linear", lambda *args: calls.append(args) or plain(*args))
    for found_missing in (False, True):
        if found_missing:
            monkeypatch.setattr(module, "onednn", lambda dtype: None)
        calls: list[object] = []
        with torch.no_grad():
            y = linear(x.transpose(0, -1).contiguous().transpose(0, -1), weight, bias, gelu)  # also where x does not lie in order
        assert len(calls) == (module.onednn(dtype) is None)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 10)
        assert ((y.double() - expected).abs().max() / expected.abs().max()).item() < (tolerance if not gelu else 2 * tolerance)


def test_linear_where_it_must_be_the_plain_one() -> None:
    assert onednn(torch.float64) is None and onednn(torch.float16) is None
    layer, x = Linear(6, 4), torch.randn(3, 6)
    layer(x, gelu=True).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))


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
