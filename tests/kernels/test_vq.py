"""Tests of the nearest-code search."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.compare import DEVICE
from var_kernels.vq import op, reference


@pytest.mark.parametrize(
    ("N", "V", "Z"), [(1, 1, 1), (5, 3, 4), (64, 64, 32), (91, 300, 32), (130, 257, 16)]
)
def test_nearest_code(N: int, V: int, Z: int) -> None:
    """The index is that of the smallest distance in float64 (random vectors have no near ties)."""
    z, codes = torch.randn(N, Z, device=DEVICE), torch.randn(V, Z, device=DEVICE)
    exact = torch.cdist(z.double(), codes.double()).argmin(1)
    assert torch.equal(op.launch(z, codes, "float32"), exact) and torch.equal(
        reference.nearest_code(z, codes), exact
    )


def test_lowest_index_wins_ties_within_and_across_tiles() -> None:
    """Every code appears three times, in the same tile and in later tiles."""
    # The codes are small whole numbers, so that every product is exact.
    codes = torch.randperm(4**4)[:50, None] // 4 ** torch.arange(4) % 4
    codes = codes.float().to(DEVICE)
    thrice = torch.cat([codes, codes, codes])
    z = codes
    assert torch.equal(op.launch(z, thrice, "float32"), torch.arange(50, device=DEVICE))


def test_views_and_wrong_precision() -> None:
    """The vectors may be rows of a wider tensor, and half precision is compared in float32."""
    wide, codes = torch.randn(20, 64, device=DEVICE), torch.randn(40, 32, device=DEVICE)
    assert torch.equal(
        op.launch(wide[:, :32], codes, "float32"),
        op.launch(wide[:, :32].contiguous(), codes, "float32"),
    )
    half = wide[:, :32].half()
    assert torch.equal(op.launch(half, codes, "float32"), reference.nearest_code(half, codes))
    with pytest.raises(ValueError, match="use float32 or tf32"):
        op.nearest_code(wide, codes, precision="fast")
