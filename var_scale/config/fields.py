"""What all sections of the config share: their base class, types of values, one kind of field."""

from __future__ import annotations

import re
from os.path import expanduser
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from var_scale.scales import normal


class WrittenFloat(float):
    """A number of a YAML file that knows how it was written, such as 1.10."""

    def __new__(cls, text: str) -> WrittenFloat:
        """The number of a YAML scalar."""
        self = super().__new__(cls, text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        self.text = text
        return self

    text: str


def as_written(value: Any) -> Any:
    """The text of a number, for a field that is text."""
    return value.text if isinstance(value, WrittenFloat) else value


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values are frozen and finite. A number is
    taken as the text that it is where a text is needed, such as the account 12345."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @model_validator(mode="before")
    @classmethod
    def _textsas_written(cls, values: Any) -> Any:
        """Numbers in fields of text keep the form in which they were written."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: as_written(value)
            if key in fields and fields[key].annotation in (str, str | None)
            else value
            for key, value in values.items()
        }

    def identity(self) -> dict[str, Any]:
        """The keys that can change the result of a run, as plain values and without nulls."""
        tree = self.model_dump(mode="json", exclude_none=True)
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if field.json_schema_extra == OUTSIDE_IDENTITY:
                tree.pop(key, None)
            elif isinstance(value, Section):
                tree[key] = value.identity()
        return tree


OUTSIDE_IDENTITY = {"identity": False}


def setting(default: Any, description: str, *, identity: bool = True, **limits: Any) -> Any:
    """A key with its default value and its meaning.

    Args:
        description: the text of docs/reference/config.md.
        identity: whether the key can change the result of a run. Two runs whose configs differ
            only in keys with `identity=False` are the same run.
        limits: limits of the value, in the words of pydantic's `Field` (gt, ge, lt, le, ...).
    """
    extra: Any = None if identity else OUTSIDE_IDENTITY
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _switch(value: Any) -> Any:
    """Undo that YAML reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _time(value: Any) -> Any:
    """Undo that YAML reads 24:00:00 as a number of seconds, and check the form."""
    text = str(value)
    if isinstance(value, int):
        text = f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}"
    if not re.fullmatch(r"(\d+-)?\d{1,4}(:\d{2}){1,2}", text):
        raise ValueError("give a time limit as HH:MM:SS or D-HH:MM:SS")
    return text


def _grid(value: Any) -> Any:
    """A side, or height and width. A square becomes its side, so that equal grids are equal."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError("give a side or [height, width], whole numbers from 1 up")
    return normal([value])[0]


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Grid = Annotated[int | tuple[int, int], BeforeValidator(_grid)]
Switch = BeforeValidator(_switch)
TimeLimit = Annotated[str, BeforeValidator(_time)]
Place = Annotated[str, AfterValidator(expanduser)]
"""A path, in which `~` is the home folder, or a URL."""
