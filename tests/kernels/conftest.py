"""Fixtures of the tests of the kernels."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed every test, because the bounds are relative errors of random tensors."""
    torch.manual_seed(0)
