"""Reads configs: YAML files, presets that they include, and `key=value` overrides."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from var_scale.config.schema import Config, StudySpec
from var_scale.config.yaml_loader import Loader
from var_scale.errors import UserError
from var_scale.files import canonical_hash, first_difference, require_content, write_text

EXCLUSIVE = {"train.epochs": "steps", "train.steps": "epochs"}
"""Keys that replace another key of `train`: a run has epochs or steps."""


def config_root() -> Path:
    """The folder of presets: beside the package in a checkout, inside an installed package.

    Raises:
        UserError: code `config.presets-missing`.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent / "configs", package / "_configs"):
        if root.is_dir():
            return root
    raise UserError(
        f"{package}: the folder of presets (configs/) is missing; install var-scale again",
        code="config.presets-missing",
    )


def presets(ending: str) -> list[str]:
    """The names of all files below `config_root` with this ending, such as .yaml."""
    root = config_root()
    return sorted(str(path.relative_to(root)) for path in root.rglob(f"*{ending}"))


def _find(names: Iterable[str], beside: Path | None) -> Path | None:
    """The first of these files that exists: in `beside`, in the working folder, or as a preset."""
    roots = [*([beside] if beside else []), Path(), config_root()]
    candidates = [root / expanduser(name) for root in roots for name in names]
    return next((path for path in candidates if path.is_file()), None)


def find_table(name: str) -> Path:
    """The CSV file of a path or of a preset name such as `study/tiny-rates`.

    Raises:
        UserError: there is no such file (code `config.not-found`).
    """
    if path := _find((name, f"{name}.csv"), None):
        return path
    raise UserError(
        f"study.rates={name}: no such table of runs; give a CSV file of `var-scale records`",
        code="config.not-found",
    )


def find_config(name: str, beside: Path | None = None) -> Path:
    """The YAML file of a path, a preset name such as `study/tiny`, or a study's folder.

    Args:
        beside: a folder to search first.

    Raises:
        UserError: there is no such file (code `config.not-found`).
    """
    if path := _find((name, f"{name}.yaml", f"{name}/study.yaml"), beside):
        return path
    known = [preset.removesuffix(".yaml") for preset in presets(".yaml")]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(known)}"
    raise UserError(f"{name}: no such config file or preset; {hint}", code="config.not-found")


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` changed by `over`: sections are merged key by key, other values are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
        )
    return result


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over the files that it includes; values are not checked yet.

    Args:
        seen: the files that include this one.

    Raises:
        UserError: codes `config.include-cycle`, `config.not-yaml` and those of `find_config`.
    """
    if path.resolve() in seen:
        raise UserError(
            f"{path}: includes itself; remove the include: line that closes the cycle",
            code="config.include-cycle",
        )
    tree = _parse_yaml(path)
    engine = tree.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed"), str):
        engine["deepspeed"] = read_deepspeed(engine["deepspeed"], path.parent)
    merged: dict[str, Any] = {}
    for name in _includes(path, tree.pop("include", [])):
        included = find_config(name, path.parent)
        merged = merge(merged, read_tree(included, (*seen, path.resolve())))
    return merge(merged, tree)


def _includes(path: Path, given: Any) -> list[str]:
    """The names after `include:`, of which there may be one, several, or none."""
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{path}: include: {given!r} is not the name of a config file or a list of names; give "
            "names such as model/d16",
            code="config.value",
        )
    return names


def _parse_yaml(path: Path) -> dict[str, Any]:
    """The plain values of one YAML file, without its includes."""
    require_content(path)
    fault = ""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), Loader) or {}
        if isinstance(tree, dict):
            return tree
        fault = f" must hold `key: value` lines, not {type(tree).__name__}"
    except UnicodeDecodeError:
        fault = " is not a text file in UTF-8; give a YAML file"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        fault = f"{where} is not valid YAML ({getattr(error, 'problem', error)})"
    except OSError as error:
        fault = f" cannot be read ({error.strerror})"
    raise UserError(f"{path}:{fault}", code="config.not-yaml")


def read_deepspeed(name: str, beside: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's own JSON, from a path or a preset name such as engine/zero2.json.

    Keys whose value is "auto" are removed: the recipe sets them.

    Raises:
        UserError: code `config.deepspeed-json`.
    """
    path = _find([name], beside)
    fault = ""
    if path is None:
        fault = f"engine.deepspeed: {name}: no such file; give a DeepSpeed JSON file, or one of "
        raise UserError(fault + ", ".join(presets(".json")), code="config.deepspeed-json")
    require_content(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(value, dict):
            automatic = ("auto", {"enabled": "auto"})
            return {key: inner for key, inner in value.items() if inner not in automatic}
        fault = "must hold a JSON object, as DeepSpeed's configuration does"
    except ValueError as error:
        fault = f"is not valid JSON ({error})"
    raise UserError(f"{path}: {fault}", code="config.deepspeed-json")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """nested("a.b", 1) = {"a": {"b": 1}}."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@dataclass(frozen=True)
class Preset:
    """The content of the preset that an override such as `engine=fsdp` names."""

    tree: dict[str, Any]


def parse_override(text: str) -> tuple[str, Any]:
    """`train.batch_size=64` as key and value; the value of `engine=fsdp` is the preset's content.

    Raises:
        UserError: codes `config.override` and those of `find_config`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"{text}: an override is key=value, such as train.batch_size=64", code="config.override"
        )
    if key in Config.model_fields and (config_root() / key).is_dir():
        return key, Preset(read_tree(find_config(f"{key}/{value}")))
    try:
        return key, yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"{text}: the value is not valid YAML ({getattr(error, 'problem', error)})",
            code="config.override",
        ) from None


def _near_key(location: tuple[Any, ...]) -> str:
    """A hint about the valid keys beside the one at `location`."""
    model: Any = Config
    for part in location[:-1]:
        field = model.model_fields.get(part)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if model is None:
            return ""
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(model.model_fields)}"


def check(tree: Mapping[str, Any], source: str) -> Config:
    """The typed config of plain values.

    Args:
        source: where the values come from, for messages.

    Raises:
        UserError: names the first wrong key (codes `config.unknown-key` and `config.value`).
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        errors = error.errors()
    # Where a value may have several forms, pydantic reports one error for each form. The error
    # whose path is longest belongs to the form that matched best.
    same = [e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same, key=lambda e: len(e["loc"]))
    where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "extra_forbidden":
        dotted = "." in str(first["loc"][-1])
        hint = (
            "in a file, write a section: `a:` and below it `b:`"
            if dotted
            else _near_key(first["loc"])
        )
        raise UserError(
            f"{source}: unknown key {where}" + (f"; {hint}" if hint else ""),
            code="config.unknown-key",
        )
    given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
    if first["input"] in ("none", "None"):
        given += "; YAML writes no value as null"
    text = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        given = ""
    raise UserError(f"{source}: {where or 'config'}: {text}{given}", code="config.value")


def load(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read a config from a path or preset name, apply the overrides in order, and check it.

    Raises:
        UserError: codes `config.*`.
    """
    tree = read_tree(find_config(name))
    for text in overrides:
        key, value = parse_override(text)
        if isinstance(value, Preset):
            # The preset replaces the section: keys of the old engine would not fit the new one.
            tree = {k: v for k, v in tree.items() if k != key} | value.tree
            continue
        if key == "engine.deepspeed" and isinstance(value, str):
            value = read_deepspeed(value)
        tree = merge(tree, nested(key, value))
        if key.partition(".")[0] in ("tokenizer", "model", "train") and tree.get("study"):
            # `common` is applied after the preset of each size, so the override wins there too.
            tree = merge(tree, {"study": {"common": {key: value}}})
    return check(tree, name)


@dataclass(frozen=True)
class Variant:
    """One point of a study's sweep: dotted keys with values, and training FLOPs where given."""

    keys: tuple[tuple[str, Any], ...] = ()
    flops: float | None = None

    @property
    def suffix(self) -> str:
        """The part of a run's name that tells it from other variants: -base_lr_0.0002-c1e18."""
        names = {True: "on", False: "off"}
        parts = []
        for key, value in self.keys:
            shown = names[value] if isinstance(value, bool) else value
            parts.append(f"{key.rpartition('.')[2]}_{shown}")
        parts += [f"c{self.flops:g}".replace("+", "")] if self.flops else []
        return "".join(f"-{re.sub(r'[^A-Za-z0-9._-]', '_', part)}" for part in parts)


def variants(spec: StudySpec, depth: int) -> list[Variant]:
    """All points of the study's grid at a depth; one point without keys where there is no grid."""
    grid = spec.grid | spec.depth_grid.get(depth, {})
    points = [tuple(zip(grid, values, strict=True)) for values in product(*grid.values())]
    budgets: list[float | None] = [*spec.flops] or [None]
    return [Variant(keys, flops) for keys in points for flops in budgets]


def run_config(config: Config, depth: int, seed: int, variant: Variant = Variant()) -> Config:
    """The config of one run of a study, without the study section.

    Later values win: the study's config, the preset of this depth, the overrides of this depth,
    the common changes, the variant's keys, the seed. The caller turns the variant's FLOPs into
    epochs (`cost.from_config.with_flops`).
    """
    assert config.study is not None
    tree = dump(config)
    tree.pop("study")
    if config.study.preset:
        tree = merge(tree, read_tree(find_config(config.study.preset.format(depth=depth))))
    tree = merge(tree, nested("model.depth", depth))
    for dotted, value in [
        *config.study.overrides.get(depth, {}).items(),
        *config.study.common.items(),
    ]:
        tree = merge(tree, nested(dotted, value))
    for key, value in variant.keys:
        preset = parse_override(f"{key}={value}")[1] if "." not in key else None
        tree = (
            {**tree, key: preset.tree[key]}
            if isinstance(preset, Preset)
            else merge(tree, nested(key, value))
        )
        if key in EXCLUSIVE:
            tree["train"].pop(EXCLUSIVE[key], None)
    tree = merge(tree, {"name": run_name(depth, seed) + variant.suffix, "train": {"seed": seed}})
    return check(tree, f"study {config.name}, depth {depth}")


def run_name(depth: int, seed: int) -> str:
    """The name of a run of a study, such as d06-s0."""
    return f"d{depth:02d}-s{seed}"


def dump(config: Config) -> dict[str, Any]:
    """The config as plain values, without keys that are None."""
    return config.model_dump(mode="json", exclude_none=True)


def config_hash(config: Config) -> str:
    """Identity of a run: the hash of all keys that can change its result (`Section.identity`)."""
    return canonical_hash(config.identity())


def difference(saved: Config, given: Config) -> str:
    """The first key in which the identities of two runs differ, with both values."""
    changed = first_difference(saved.identity(), given.identity())
    assert changed, "the runs are the same"
    return "{} was {} and is now {}".format(*changed)


def write_config(config: Config, path: Path) -> None:
    """Save the resolved config as YAML."""
    write_text(path, yaml.safe_dump(dump(config), sort_keys=False))
