"""Every error has a registered code, and every registered code is in use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from var_scale.errors import CODES

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "var_scale").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def calls(path: Path) -> list[ast.Call]:
    """All calls in a file."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def literals(node: ast.AST) -> set[str]:
    """The strings in an expression, such as both values of `"a.b" if x else "a.c"`."""
    inner = (item.value for item in ast.walk(node) if isinstance(item, ast.Constant))
    return {value for value in inner if isinstance(value, str)}


def given_codes() -> dict[str, str]:
    """Every code that a call gives as `code=`, with the file of one such call."""
    found: dict[str, str] = {}
    for path in SOURCES:
        for call in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "code":
                    codes = {text for text in literals(keyword.value) if "." in text}
                    found |= dict.fromkeys(codes, str(path.relative_to(ROOT)))
    return found


def test_codes_have_the_form_room_and_reason() -> None:
    """Lower case, with hyphens inside the reason, and a meaning that a user can read."""
    wrong = [code for code in CODES if not re.fullmatch(r"[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*", code)]
    assert not wrong
    assert all(meaning.strip() for meaning in CODES.values())


def test_every_given_code_is_registered() -> None:
    """An error with another code could not be found in docs/reference/errors.md."""
    unknown = {code: file for code, file in given_codes().items() if code not in CODES}
    assert not unknown


def test_every_registered_code_is_used() -> None:
    """A code that occurs nowhere else, not even in a table of codes, belongs to no error."""
    text = "".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    text += (ROOT / "var_scale" / "errors.py").read_text().split("class UserError")[1]
    assert not [code for code in CODES if f'"{code}"' not in text]


def test_every_user_error_has_a_code() -> None:
    """`UserError(...)` without `code=` cannot be matched by programs."""
    without = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id == "UserError"
        if not any(keyword.arg in ("code", None) for keyword in call.keywords)
    ]
    assert not without
