"""docs/config.md from the schema: `python -m var_scale.config.reference > docs/config.md`."""

from __future__ import annotations

from pydantic import BaseModel

from var_scale.config.schema import Config


def _kind(annotation: object) -> str:
    """A short name of a type."""
    text = getattr(annotation, "__name__", str(annotation)) if not getattr(annotation, "__args__", None) else str(annotation)
    for old, new in (("typing.", ""), ("Optional", ""), ("NoneType", "none"), ("None", "none"), ("Annotated[int, Gt(gt=0)]", "int"),
                     ("var_scale.config.schema.", ""), ("Literal", "")):  # fmt: skip
        text = text.replace(old, new)
    return text.replace("|", "or").replace(" or none", ", or none")


def _section(name: str, model: type[BaseModel]) -> list[str]:
    lines = [f"\n## {name or 'top level'}\n", (model.__doc__ or "").strip().split("\n")[0]]
    lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    nested = []
    for key, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        path = f"{name}.{key}" if name else key
        if inner:
            nested.append((path, inner))
            lines.append(f"| `{key}` | section | | see [{path}](#{path.replace('.', '')}) |")
            continue
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        lines.append(f"| `{key}` | {_kind(field.annotation)} | {default} | {(field.description or '').replace('|', '/')} |")
    for path, inner in nested:
        lines += _section(path, inner)
    return lines


def reference() -> str:
    """The page as Markdown."""
    source = "Generated from `var_scale/config/schema.py` by `python -m var_scale.config.reference`. Unknown keys are errors."
    return "\n".join([f"# Config reference\n\n{source}", *_section("", Config)]) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
