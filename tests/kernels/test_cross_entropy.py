"""Tests of the output projection with its cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.compare import DEVICE, DTYPES, check, relative
from var_kernels.cross_entropy import op, reference


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels on every device."""
    monkeypatch.setattr(op, "use_triton", lambda _: True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.01)])
@pytest.mark.parametrize(
    ("N", "C", "V"), [(1, 16, 2), (14, 24, 100), (30, 32, 256), (37, 20, 1000), (3, 16, 4096)]
)
def test_linear_cross_entropy(
    N: int, C: int, V: int, smoothing: float, z_loss: float, dtype: torch.dtype
) -> None:
    """The losses per token and the gradients of input, weight and bias match.

    Each token has a different factor.
    """
    x, w, b = (
        torch.randn(N, C, device=DEVICE),
        torch.randn(V, C, device=DEVICE) / C**0.5,
        torch.randn(V, device=DEVICE),
    )
    target = torch.randint(V, (N,), device=DEVICE)

    def ours(x, w, b):
        return op.linear_cross_entropy(x, w, b, target, smoothing, z_loss)[0]

    def reference_form(x, w, b):
        return reference.cross_entropy(F.linear(x, w, b), target, smoothing, z_loss)[0]

    check(ours, reference_form, [t.to(dtype) for t in (x, w, b)], [torch.rand(N, device=DEVICE)])


def test_reference_is_the_loss_of_pytorch() -> None:
    """Label smoothing matches the definition in torch.

    The operator also returns the loss without smoothing, and the lowest index among equals.
    """
    z, target = torch.randn(40, 64, dtype=torch.float64), torch.randint(64, (40,))
    loss, ce, best = reference.cross_entropy(z, target, 0.1)
    torch.testing.assert_close(
        loss, F.cross_entropy(z, target, reduction="none", label_smoothing=0.1)
    )
    torch.testing.assert_close(ce, F.cross_entropy(z, target, reduction="none"))
    torch.testing.assert_close(
        reference.cross_entropy(z, target, 0.1, 0.5)[0], loss + 0.5 * z.exp().sum(-1).log().square()
    )
    assert torch.equal(best, z.argmax(-1))


def test_likeliest_code_and_clean_loss() -> None:
    """The arg-max comes from the same pass, and equal logits give the lowest index."""
    logits = torch.randn(9, 100, device=DEVICE)
    logits[4] = 0.0
    logits[5, [7, 50]] = 9.0
    target = torch.randint(100, (9,), device=DEVICE)
    before = logits.clone()
    loss, ce, best = op.launch(logits, target, 0.1, 0.0, gradient=False)
    assert (
        torch.equal(logits, before)
        and int(best[4]) == 0
        and int(best[5]) == 7
        and torch.equal(best, logits.argmax(-1))
    )
    torch.testing.assert_close(
        ce, F.cross_entropy(logits, target, reduction="none"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        loss,
        F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1),
        rtol=1e-5,
        atol=1e-5,
    )


def test_extreme_logits() -> None:
    """Logits of 1e4 do not overflow, and the loss of a certain prediction is correct."""
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[0, 3], logits[1, 3] = 1e4, -1e4
    loss, _, _ = op.launch(logits, torch.tensor([3, 3], device=DEVICE), 0.0, 0.0, gradient=True)
    assert (
        float(loss[0]) == 0.0
        and float(loss[1]) == pytest.approx(1e4, rel=1e-3)
        and torch.isfinite(logits).all()
    )


def test_the_mean_does_not_underflow_in_float16() -> None:
    """A factor of 1e-6 per token works without a loss scale, below float16's smallest normal
    number."""
    x, w, b = (
        torch.randn(64, 16, device=DEVICE).half(),
        torch.randn(32, 16, device=DEVICE),
        torch.randn(32, device=DEVICE),
    )
    target = torch.randint(32, (64,), device=DEVICE)
    w.requires_grad_()
    (op.linear_cross_entropy(x, w, b, target)[0].sum() * 1e-6).backward()
    assert w.grad is not None
    got, w.grad = w.grad, None
    (
        reference.cross_entropy(F.linear(x.double(), w.double(), b.double()), target, 0.0)[0].sum()
        * 1e-6
    ).backward()
    assert relative(got, w.grad) < 3e-3


def test_expanded_gradients_and_strided_inputs() -> None:
    """The gradient may be one expanded number (strides 0), and x may be a part of a wider
    tensor."""
    wide, w = (
        torch.randn(12, 40, device=DEVICE),
        torch.randn(32, 16, device=DEVICE, requires_grad=True),
    )
    x, target = wide[:, 3:19].detach().requires_grad_(), torch.randint(32, (12,), device=DEVICE)
    got = torch.autograd.grad(op.linear_cross_entropy(x, w, None, target)[0].sum(), [x, w])
    exact = torch.autograd.grad(
        F.cross_entropy(x.double() @ w.double().t(), target, reduction="sum"), [x, w]
    )
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_wrong_calls() -> None:
    """Shapes that do not fit are errors; a target that is not a code gives a NaN loss."""
    x, w, b = (
        torch.randn(8, 16, device=DEVICE),
        torch.randn(32, 16, device=DEVICE),
        torch.randn(32, device=DEVICE),
    )
    target = torch.randint(32, (8,), device=DEVICE)
    targets = (target[:5], target.float())
    for wrong in (
        (x[None], w, b, target),
        (x, w[:, :5], b, target),
        (x, w, b[:5], target),
        *((x, w, b, t) for t in targets),
    ):
        with pytest.raises(ValueError, match="needed, not"):
            op.linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="outside"):
        op.linear_cross_entropy(x, w, b, target, 2.0)
    target[2], target[5] = -100, 32
    loss, _, _ = op.linear_cross_entropy(x, w, b, target)
    assert loss.isnan().nonzero().flatten().tolist() == [2, 5]


def test_without_a_gradient_nothing_is_kept() -> None:
    x, w = torch.randn(8, 16, device=DEVICE), torch.randn(32, 16, device=DEVICE, requires_grad=True)
    target = torch.randint(32, (8,), device=DEVICE)
    with torch.no_grad():
        assert op._forward(x, w, None, target, 0.0, 0.0, False)[3].numel() == 0
    loss, ce, _ = op.linear_cross_entropy(x, w, None, target)
    assert loss.requires_grad and not ce.requires_grad
    with pytest.raises(ValueError, match="larger than 16384"):
        op.linear_cross_entropy(x, torch.empty(16385, 16, device=DEVICE), None, target)


def test_without_a_gradient_a_part_of_the_logits_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results in parts are those of the whole, and no product has more logits than allowed."""
    x, w, b = torch.randn(37, 16), torch.randn(100, 16), torch.randn(100)
    target = torch.randint(100, (37,))
    inputs = [t.to(DEVICE) for t in (x, w, b, target)]
    whole = op.linear_cross_entropy(*inputs, 0.1)
    sizes: list[int] = []

    def logits(*given: torch.Tensor) -> torch.Tensor:
        made = F.linear(*given)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(op, "MOST_LOGITS", 1050)
    monkeypatch.setattr(op, "_logits", logits)
    parts = op.linear_cross_entropy(*inputs, 0.1)
    assert sizes == [1000, 1000, 1000, 700]
    for part, all_at_once in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_at_once)
