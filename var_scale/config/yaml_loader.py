"""YAML as configs are written: numbers are numbers only where nobody would read them as text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from var_scale.config.fields import WrittenFloat


class Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error (the plain loader silently keeps the last one), and
    in which only plain numbers, true and false are not text: the plain loader reads the account
    0755 as 493, the time 12:30:00 as 45000, 1_0 as 10, and no as false."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] in ("null", "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""What is not text, by its form and its possible first characters."""
for _kind, (_form, _first) in PLAIN.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_form})$"), list(_first)
    )


def _written(loader: yaml.SafeLoader, node: yaml.Node) -> WrittenFloat:
    """A number that remembers its text."""
    assert isinstance(node, yaml.ScalarNode)
    return WrittenFloat(str(loader.construct_scalar(node)))


Loader.add_constructor("tag:yaml.org,2002:float", _written)
