"""Scaling laws over arrays. `from var_scale.laws import fit` fits a law to any table of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_scale.laws.api import fit

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    """Import `fit` on first use, so that importing the package stays cheap."""
    if name != "fit":
        raise AttributeError(name)
    from var_scale.laws.api import fit

    return fit
