"""Writes docs/reference/config.md from the schema of the config."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from var_scale.config.schema import Config

HEAD = """# Config reference

Every key of a config, as the schema in `var_scale/config/` defines it. An unknown key is an error;
a key without a value is `null`. In a path, `~` is the home folder. `make docs` writes this page."""


def page() -> str:
    """The text of docs/reference/config.md."""
    return "\n".join([HEAD, *_section("", Config)]) + "\n"


def _kind(annotation: object) -> str:
    """A short name of a type: int, list of int, one of `a`, `b`, str or null."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return f"map of {_kind(inner[0])} to {_kind(inner[1])}"
    names: dict[Any, str] = {NoneType: "null", Any: "any"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _range(metadata: list[Any]) -> str:
    """The bounds of a number, such as "> 0"."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [(sign, getattr(item, name, None)) for item in metadata for name, sign in signs.items()]
    bounds = [f"{sign} {value:g}" for sign, value in found if value is not None]
    return f", {' and '.join(bounds)}" if bounds else ""


def _section(name: str, model: type[BaseModel]) -> list[str]:
    """The table of a section, then those of the sections within it."""
    lines = [f"\n## {name or 'top level'}\n", (model.__doc__ or "").strip().split("\n")[0]]
    lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    nested = []
    for key, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        path = f"{name}.{key}" if name else key
        if inner:
            nested.append((path, inner))
            link = path.replace(".", "")
            lines.append(f"| `{key}` | section | | see [{path}](#{link}) |")
            continue
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else f"`{'null' if value is None else value}`"
        kind = _kind(field.annotation) + _range(field.metadata)
        meaning = (field.description or "").replace("|", "/")
        lines.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    for path, inner in nested:
        lines += _section(path, inner)
    return lines
