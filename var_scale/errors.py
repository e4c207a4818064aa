"""The one exception a person is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to mend it. The command exits with code 2."""
