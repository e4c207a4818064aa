"""Reading YAML: presets by `include:`, `key=value` overrides, and one clear line for every mistake."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from var_scale.config.schema import Config, StudySpec
from var_scale.errors import UserError
from var_scale.files import canonical_hash, flat


def config_root() -> Path:
    """The folder of presets: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent / "configs", package / "_configs"):
        if root.is_dir():
            return root
    raise UserError(f"{package}: the folder of presets (configs/) is missing; install var-scale again")


def find_config(name: str, beside: Path | None = None) -> Path:
    """A YAML file by path, or by preset name such as `study/tiny` or `engine/zero1`; of a study's folder its study.yaml."""
    names = [name, f"{name}.yaml", f"{name}/study.yaml"]
    roots = [*([beside] if beside else []), Path(), config_root()]
    for root in roots:
        for candidate in names:
            if (root / candidate).is_file():
                return root / candidate
    known = sorted(str(p.relative_to(config_root()).with_suffix("")) for p in config_root().rglob("*.yaml"))
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, 1, 0.5)
    raise UserError(f"{name}: no such config file or preset" + (f"; did you mean {near[0]}?" if near else f"; presets: {', '.join(known)}"))


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: sections key by key, anything else replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; the plain loader takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file with its includes merged below it, unchecked."""
    if path.resolve() in seen:
        raise UserError(f"{path}: includes itself; remove the circle of include: lines")
    try:
        tree = yaml.load(path.read_text(), _Loader) or {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8; give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}:{where} is not valid YAML ({getattr(error, 'problem', error)})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold `key: value` lines, not {type(tree).__name__}")
    engine = tree.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed"), str):
        engine["deepspeed"] = read_deepspeed(engine["deepspeed"], path.parent)
    includes = tree.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [includes] if isinstance(includes, str) else includes:
        merged = merge(merged, read_tree(find_config(str(name), path.parent), (*seen, path.resolve())))
    return merge(merged, tree)


def read_deepspeed(name: str, beside: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's own JSON, by path or preset name such as engine/zero2.json; keys whose value is "auto" are left to the recipe."""
    roots = [*([beside] if beside else []), Path(), config_root()]
    path = next((root / name for root in roots if (root / name).is_file()), None)
    if path is None:
        known = ", ".join(sorted(str(p.relative_to(config_root())) for p in config_root().rglob("*.json")))
        raise UserError(f"engine.deepspeed: {name}: no such file; give a DeepSpeed JSON, or one of {known}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, as DeepSpeed's configuration")
    return {key: inner for key, inner in value.items() if inner not in ("auto", {"enabled": "auto"})}


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """nested("a.b", 1) = {"a": {"b": 1}}."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@dataclass(frozen=True)
class Preset:
    """The file that an override such as `engine=fsdp` names."""

    tree: dict[str, Any]


def parse_override(text: str) -> tuple[str, Any]:
    """`train.batch_size=64` as key and value; `engine=fsdp` takes the preset configs/engine/fsdp.yaml."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text}: an override is key=value, such as train.batch_size=64")
    field = Config.model_fields.get(key)
    if field is not None and (config_root() / key).is_dir():
        return key, Preset(read_tree(find_config(f"{key}/{value}")))
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text}: the value is not valid YAML") from None


def _near_key(location: tuple[Any, ...]) -> str:
    """The nearest valid key to the one at `location`."""
    model: Any = Config
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return ""
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    if model is None:
        return ""
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(model.model_fields)}"


def check(tree: Mapping[str, Any], source: str) -> Config:
    """The typed config, or a UserError that names the first wrong key."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        errors = error.errors()
        same = [e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]]
        first = max(same, key=lambda e: len(e["loc"]))  # of a union, the form that came nearest
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        if first["type"] == "extra_forbidden":
            dotted = "; in a file write a section, `a:` and below it `b:`" if "." in str(first["loc"][-1]) else _near_key(first["loc"])
            raise UserError(f"{source}: unknown key {where}{dotted}") from None
        given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
        if first["input"] in ("none", "None"):
            given += "; nothing is written null"
        text = first["msg"].removeprefix("Value error, ")
        if isinstance(first["input"], dict):
            given = ""
        raise UserError(f"{source}: {where or 'config'}: {text}{given}") from None


def load(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read a config by path or preset name, apply overrides in order, check it."""
    tree = read_tree(find_config(name))
    for text in overrides:
        key, value = parse_override(text)
        if isinstance(value, Preset):
            tree = {k: v for k, v in tree.items() if k != key} | value.tree  # nothing of the old section stays
            continue
        if key == "engine.deepspeed" and isinstance(value, str):
            value = read_deepspeed(value)
        tree = merge(tree, nested(key, value))
        if key.partition(".")[0] in ("tokenizer", "model", "train") and tree.get("study"):
            tree = merge(tree, {"study": {"common": {key: value}}})  # stronger than a size's preset
    return check(tree, name)


@dataclass(frozen=True)
class Variant:
    """One point of a study's grid: dotted keys and values, and training FLOPs where the study lists them."""

    keys: tuple[tuple[str, Any], ...] = ()
    flops: float | None = None

    @property
    def suffix(self) -> str:
        """What it adds to a run's name: -base_lr_0.0002-c1e18."""
        parts = [f"{key.rpartition('.')[2]}_{'on' if value is True else 'off' if value is False else value}" for key, value in self.keys]
        parts += [f"c{self.flops:g}".replace("+", "")] if self.flops else []
        return "".join(f"-{re.sub(r'[^A-Za-z0-9._-]', '_', part)}" for part in parts)


def variants(spec: StudySpec) -> list[Variant]:
    """All points of the grid, one without keys where there is none."""
    points = [tuple(zip(spec.grid, values, strict=True)) for values in product(*spec.grid.values())]
    return [Variant(keys, flops) for keys in points for flops in (spec.flops or [None])]  # type: ignore[list-item]


def run_config(config: Config, depth: int, seed: int, variant: Variant = Variant()) -> Config:
    """The config of one run of a study: the size's preset, its depth, its overrides, the common ones, its point of the grid, its seed; no
    study section. A point's FLOPs are for `with_flops`."""
    assert config.study is not None
    tree = dump(config)
    tree.pop("study")
    if config.study.preset:
        tree = merge(tree, read_tree(find_config(config.study.preset.format(depth=depth))))
    tree = merge(tree, nested("model.depth", depth))
    for dotted, value in [*config.study.overrides.get(depth, {}).items(), *config.study.common.items()]:
        tree = merge(tree, nested(dotted, value))
    for key, value in variant.keys:
        preset = parse_override(f"{key}={value}")[1] if "." not in key else None
        tree = {**tree, key: preset.tree[key]} if isinstance(preset, Preset) else merge(tree, nested(key, value))
        if key in EXCLUSIVE:
            tree["train"].pop(EXCLUSIVE[key], None)
    tree = merge(tree, {"name": run_name(depth, seed) + variant.suffix, "train": {"seed": seed}})
    return check(tree, f"study {config.name}, depth {depth}")


EXCLUSIVE = {"train.epochs": "steps", "train.steps": "epochs"}


def run_name(depth: int, seed: int) -> str:
    """d06-s0."""
    return f"d{depth:02d}-s{seed}"


def dump(config: Config) -> dict[str, Any]:
    """Plain values, without keys that are None (so that defaults can still be filled in)."""
    return config.model_dump(mode="json", exclude_none=True)


def config_hash(config: Config) -> str:
    """Identity of a run: the hash of everything that can change its result (not logging, engine, micro-batches, or where files lie)."""
    return canonical_hash(_identity(config))


def difference(there: Config, here: Config) -> str:
    """The first key in which the identities of two runs differ, with both values."""
    one, two = flat(_identity(there)), flat(_identity(here))
    key = next(key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key))
    return f"{key}: {one.get(key)} there, {two.get(key)} here"


def _identity(config: Config) -> dict[str, Any]:
    tree = dump(config)
    for section in ("log", "engine", "study", "cluster"):
        tree.pop(section, None)
    for key in ("checkpoint_seconds", "keep_checkpoints", "keep_steps", "keep_at", "eval_batch", "hang_seconds", "nonfinite",
                "nonfinite_limit", "accumulate"):  # fmt: skip
        tree["train"].pop(key, None)
    for key in ("images_train", "images_val", "tokens_train", "tokens_val", "check", "decoders", "cache", "cache_gb",
                "train_samples", "samples_per_shard"):  # fmt: skip
        tree["data"].pop(key, None)  # a moved folder is the same data; its identity is the manifest's digest
    tree["tokenizer"].pop("weights", None)
    for key in ("vgg_weights", "lpips_weights"):
        tree["tokenizer"]["train"].pop(key, None)
    return tree


def write_config(config: Config, path: Path) -> None:
    """Save the resolved config."""
    from var_scale.files import write_text

    write_text(path, yaml.safe_dump(dump(config), sort_keys=False))
