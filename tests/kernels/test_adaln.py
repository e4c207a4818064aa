"""Tests of the gated residual and AdaLN."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import DEVICE, DTYPES, check
from var_kernels.adaln import launch, op, reference

SHAPES = [
    (1, 1, 64),
    (3, 5, 24),
    (2, 10, 100),
    (1, 19, 192),
    (2, 3, 3 if DEVICE == "cuda" else 1),
    (5, 3, 257),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels on every device, launched as on a GPU with one multiprocessor.

    This gives 16 programs forward and 8 backward, so that a program has several rows, and the last
    programs have fewer or none (19 rows).
    """
    monkeypatch.setattr(op, "use_triton", lambda _: True)
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 1)


def conditions(B: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return gamma, scale and shift as in the model: rows of one (B, 6, C) tensor."""
    ada = torch.randn(B, 6, C, device=DEVICE).to(dtype)
    return [ada[:, 0], ada[:, 2], ada[:, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_adaln(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """x', h and the gradients of x, y, gamma, scale, shift match, also where a sample drops the
    branch."""
    B, L, C = shape
    x, y, gx, gh = (torch.randn(B, L, C, device=DEVICE).to(dtype) for _ in range(4))
    keep = torch.rand(B, device=DEVICE).gt(0.4).float() * 1.5

    def reference_form(x, y, gamma, scale, shift):
        x_new = reference.gate_residual(x, y, gamma, keep)
        return x_new, reference.adaln(x_new, scale, shift, 1e-6)

    check(
        lambda *t: op.gate_adaptive_layer_norm(*t, keep_B=keep),
        reference_form,
        [x, y, *conditions(B, C, dtype)],
        [gx, gh],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_adaln(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The norm without the gate matches the reference."""
    B, L, C = shape
    x, g = (torch.randn(B, L, C, device=DEVICE).to(dtype) for _ in range(2))
    check(
        op.adaptive_layer_norm,
        lambda *t: reference.adaln(*t, 1e-6),
        [x, *conditions(B, C, dtype)[1:]],
        [g],
    )


def test_float32_residual_stream_and_condition_shapes() -> None:
    """For x in float32 and y in bfloat16, x' stays float32 and h is bfloat16.

    The conditions are (B, 1, C) in float32, as with shared AdaLN.
    """
    x, y = torch.randn(2, 5, 40, device=DEVICE), torch.randn(2, 5, 40, device=DEVICE).bfloat16()
    gamma, scale, shift = (torch.randn(2, 1, 40, device=DEVICE) for _ in range(3))
    x_new, h = op.gate_adaptive_layer_norm(x, y, gamma, scale, shift)
    assert x_new.dtype == torch.float32 and h.dtype == torch.bfloat16
    torch.testing.assert_close(
        x_new, reference.gate_residual(x, y, gamma, None), rtol=1e-6, atol=1e-6
    )
    assert op.adaptive_layer_norm(x, scale, shift, out_dtype=torch.float16).dtype == torch.float16


def test_expanded_and_strided_gradients() -> None:
    """The gradient may be one expanded number, and the inputs may be views of wider tensors."""
    wide = torch.randn(2, 6, 64, device=DEVICE)
    x = wide[:, ::2].detach().requires_grad_()
    scale, shift = (torch.randn(2, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    op.adaptive_layer_norm(x, scale, shift).sum().backward()
    assert x.grad is not None and shift.grad is not None
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 3.0))
    # The gradient of LN has no mean.
    assert float(x.grad.sum(-1).abs().max()) < 1e-4


def test_a_large_mean_does_not_hurt() -> None:
    """The variance is that of the centred row, so that a mean of 1000 costs only its own
    rounding."""
    x = torch.randn(1, 4, 96, device=DEVICE) + 1000.0
    zero = torch.zeros(1, 96, device=DEVICE)
    exact = reference.adaln(x.double(), zero, zero, 1e-6).float()
    torch.testing.assert_close(op.adaptive_layer_norm(x, zero, zero), exact, rtol=1e-3, atol=1e-3)


def test_strided_keep_and_nothing() -> None:
    """The factors may be a column of a wider tensor, and the batch may be empty."""
    x, rows = (
        torch.randn(3, 2, 16, device=DEVICE),
        [torch.randn(3, 16, device=DEVICE) for _ in range(3)],
    )
    keep = torch.tensor([[0.0, 9.0], [2.0, 9.0], [1.0, 9.0]], device=DEVICE)[:, 0]
    got, _ = op.gate_adaptive_layer_norm(x, x, *rows, keep_B=keep)
    torch.testing.assert_close(
        got, reference.gate_residual(x, x, rows[0], keep), rtol=1e-6, atol=1e-6
    )


def test_wrong_shapes() -> None:
    x, row = torch.randn(2, 3, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"scale has the shape \(2, 8\)"):
        op.adaptive_layer_norm(x, row[:, :8], row)
    with pytest.raises(ValueError, match="y has the shape"):
        op.gate_adaptive_layer_norm(x, x[:, :2], row, row, row)
    with pytest.raises(ValueError, match="keep has the shape"):
        op.gate_adaptive_layer_norm(x, x, row, row, row, keep_B=torch.ones(3, device=DEVICE))
