"""Numbers in the cells of tables and logs, and how a message shows a cell."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

LONGEST = 400
"""Characters of a number at most: no count or loss needs more."""
LARGEST = 2**63 - 1
"""Of a whole number that a person writes."""
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,6})?")
NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)


def shown(value: object, most: int = 60) -> str:
    """A value as in Python, with at most about `most` characters of it."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= most else f"{text[:most]}..."
    return repr(cut) if isinstance(value, str) else cut


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, the first of many and the start of long ones."""
    cut = [name if len(name) <= 60 else f"{name[:60]}..." for name in names[:most]]
    return ", ".join([*cut, "..."] if len(names) > most else cut)


def number(text: str) -> float:
    """A number, nan or inf, in ASCII digits. Python's float also reads 1_0 and other digits, which
    are slips in a table.

    Raises:
        ValueError: it is no number, or has more than `LONGEST` characters.
    """
    text = text.strip()
    if len(text) <= LONGEST and (NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(text)):
        return float(text)
    raise ValueError(f"{shown(text)} is not a number")


def whole(text: str) -> int:
    """A whole number, exactly; 12.0 and 1e6 are whole.

    Raises:
        ValueError: it is no number, not whole, or beyond `LARGEST`.
    """
    if math.isfinite(number(text)):
        value = Decimal(text.strip())
        if abs(value) <= LARGEST and value == value.to_integral_value():
            return int(value)
    raise ValueError(f"{shown(text)} is not a whole number up to {LARGEST}")
