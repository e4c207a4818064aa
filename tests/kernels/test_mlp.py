"""Tests of the two-layer MLP."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import DEVICE, DTYPES, check
from var_kernels.mlp import op, reference

SHAPES = [(1, 1, 16, 64), (3, 14, 20, 130), (1, 5, 4, 1100)]
"""The last shape needs two programs across the columns backward."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels on every device."""
    monkeypatch.setattr(op, "use_triton", lambda _: True)


def weights(C: int, F: int, dtype: torch.dtype) -> list[torch.Tensor]:
    w1, w2 = torch.randn(F, C, device=DEVICE) / C**0.5, torch.randn(C, F, device=DEVICE) / F**0.5
    return [
        t.to(dtype) for t in (w1, torch.randn(F, device=DEVICE), w2, torch.randn(C, device=DEVICE))
    ]


@pytest.mark.parametrize("save", ["preact", "both", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mlp(shape: tuple[int, int, int, int], dtype: torch.dtype, save: str) -> None:
    """The output and the gradients of input, weights and biases match for every value of `save`."""
    B, L, C, F = shape
    x, g = (torch.randn(B, L, C, device=DEVICE).to(dtype) for _ in range(2))
    check(lambda *t: op.gelu_mlp(*t, save=save), reference.mlp, [x, *weights(C, F, dtype)], [g])


def test_what_is_kept() -> None:
    """preact keeps one (tokens, F) tensor, both keeps two, and input keeps none."""
    x = torch.randn(3, 7, 16, device=DEVICE, requires_grad=True)
    parameters = [t.requires_grad_() for t in weights(16, 64, torch.float32)]
    for save, count in (("input", 0), ("preact", 1), ("both", 2)):
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t
        ):
            op.gelu_mlp(x, *parameters, save=save)
        assert kept.count(torch.Size((3, 7, 64))) == count, (save, kept)
    with pytest.raises(ValueError, match="save='all' is not known"):
        op.gelu_mlp(x, *parameters, save="all")


def test_expanded_gradients_strided_inputs_and_wrong_shapes() -> None:
    """The gradient may be one expanded number (strides 0), and x may be a part of a wider tensor.

    Weights that do not fit are errors.
    """
    x = torch.randn(3, 7, 40, device=DEVICE)[..., 5:21].detach().requires_grad_()
    parameters = [t.requires_grad_() for t in weights(16, 64, torch.float32)]
    got = torch.autograd.grad(op.gelu_mlp(x, *parameters).sum(), [x, *parameters])
    exact = torch.autograd.grad(
        reference.mlp(x.double(), *(t.double() for t in parameters)).sum(), [x, *parameters]
    )
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    w1, b1, w2, b2 = parameters
    for wrong in (
        (x[..., :9], w1, b1, w2, b2),
        (x, w1, b1[:3], w2, b2),
        (x, w1, b1, w2[:, :5], b2),
        (x, w1, b1, w2, b2[:5]),
    ):
        with pytest.raises(ValueError, match="are needed"):
            op.gelu_mlp(*wrong)


def test_gelu_of_large_values() -> None:
    """The exponential does not overflow: gelu(-large) = 0 and gelu(large) = large."""
    h = torch.tensor([-1e4, -60.0, -5.0, 0.0, 5.0, 60.0, 1e4], device=DEVICE)
    torch.testing.assert_close(
        op.gelu(h), torch.nn.functional.gelu(h, approximate="tanh"), rtol=1e-6, atol=1e-6
    )
