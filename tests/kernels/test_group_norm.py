"""Tests of the group norm and SiLU of channels-last maps."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import DEVICE, DTYPES, ROOM, relative
from var_kernels.group_norm import op, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "C", "side", "groups", "silu"),
    [(2, 160, 7, 32, True), (1, 64, 33, 32, False), (3, 24, 1, 3, True)],
)
def test_group_norm_silu(
    B: int,
    C: int,
    side: int,
    groups: int,
    silu: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result matches float64 at a large mean, repeats bit for bit, and keeps the memory
    format."""
    monkeypatch.setattr(op, "use_triton", lambda _: True)
    x = (
        (torch.randn(B, C, side, side + 1, device=DEVICE) * 2 + 20)
        .to(dtype)
        .to(memory_format=torch.channels_last)
    )
    weight, bias = (torch.randn(C, device=DEVICE) for _ in range(2))
    y = op.group_norm_silu(x, weight, bias, groups, 1e-6, silu)
    exact = reference.group_norm(x.double(), weight.double(), bias.double(), groups, 1e-6, silu)
    same = reference.group_norm(x, weight, bias, groups, 1e-6, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, exact) <= max(2 * relative(same, exact), ROOM[dtype])
    assert torch.equal(y, op.group_norm_silu(x, weight, bias, groups, 1e-6, silu))


def test_what_cannot_be_done_is_said() -> None:
    x, w = torch.randn(1, 6, 2, 2), torch.ones(6)
    with pytest.raises(ValueError, match="do not divide"):
        op.group_norm_silu(x, w, w, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        op.group_norm_silu(x.requires_grad_(), w, w, 3)
    assert torch.allclose(
        op.group_norm_silu(x.detach(), w, w, 3),
        reference.group_norm(x.detach(), w, w, 3, 1e-5, True),
    )
