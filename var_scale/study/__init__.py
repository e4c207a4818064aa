"""Scaling laws. `from var_scale.study import fit` fits a law to any numbers: see `var_scale.study.api.fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from var_scale.study.api import fit

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    """`fit`, when it is asked for: reading a run's records needs no statistics."""
    if name != "fit":
        raise AttributeError(name)
    from var_scale.study.api import fit

    return fit
