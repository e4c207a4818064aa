"""Checks of errors by their code: the wording of a message may change, but its names may not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from var_scale.errors import CODES, UserError


@contextmanager
def raises(code: str, *names: object) -> Iterator[None]:
    """The block raises a UserError of this code, in one line that holds each of `names`."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert caught.value.code == code and code in CODES, (caught.value.code, message)
    assert "\n" not in message
    assert all(str(name) in message for name in names), (names, message)
