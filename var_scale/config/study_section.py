"""The section `study`: the ladder, and what is made from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from var_scale.config.fields import Fraction, Place, Positive, PositiveFloat, Section, setting

Metric = Literal["loss_last", "loss_avg", "err_last", "err_avg"]


class StudySpec(Section):
    """The ladder of models, and how laws, plan and report are made from it."""

    depths: tuple[Positive, ...] = setting((), "depths of the ladder, one model size each")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = setting(
        (0,), "seeds of every size", min_length=1
    )
    depth_seeds: dict[int, tuple[Annotated[int, Field(ge=0)], ...]] = setting(
        {}, "seeds of single depths, in place of study.seeds: {2: [0, 1, 2]}"
    )
    count: Literal["paper", "total"] = setting(
        "paper",
        "the parameters that N counts in the laws: paper (18 d C^2, the matrices of the blocks) or "
        "total (also embeddings and head, for small models in which they are a large share)",
    )
    parallel: Positive = setting(
        1, "runs that train at the same time on this machine, each in one process"
    )
    preset: str | None = setting(None, "preset of each size, such as model/d{depth}")
    grid: dict[str, list[Any]] = setting(
        {},
        "dotted keys to sweep, each with a list of values; every combination is run for every size "
        "and seed; values of engine are names of presets",
    )
    depth_grid: dict[int, dict[str, list[Any]]] = setting(
        {},
        "values of study.grid for single depths, in place of those of the grid: "
        "{6: {train.epochs: [1]}}",
    )
    flops: list[PositiveFloat] = setting(
        [],
        "training FLOPs of a run; every size is trained with each of them, which sets its epochs "
        "(isoFLOP curves)",
    )
    budget_hours: PositiveFloat | None = setting(
        None,
        "most device-hours that the plan may need on the device named in study.device; a larger "
        "plan is refused",
    )
    overrides: dict[int, dict[str, Any]] = setting({}, "changed keys (dotted) of single depths")
    common: dict[str, Any] = setting(
        {},
        "dotted keys changed for every size after its preset; key=value on the command line is "
        "added here",
    )
    floors: dict[Metric, float] = setting({}, "irreducible value of a metric in the form `power`")
    exclude: dict[str, str] = setting({}, "runs to exclude from the laws, with the reason")
    keep: dict[str, str] = setting(
        {}, "runs to keep although the gate excludes them, with the reason"
    )
    device: str = setting(
        "auto",
        "device for the expected times; auto: measured on this machine; or a device such as h100, "
        "whose peak is known",
    )
    devices: Positive = setting(1, "number of named devices per run, for the expected times")
    mfu: float = setting(0.4, "assumed fraction of the named device's peak", gt=0, le=1)
    rates: Place | None = setting(
        None,
        "table of runs (from `var-scale records`) of a sweep of learning rates with this recipe; "
        "the report reads from it whether each size was trained at its best rate",
    )
    quality_samples: int = setting(
        0,
        "number of images that the study samples from every size and kept checkpoint to measure "
        "their quality; 0: none, which leaves it to `study quality`",
        ge=0,
    )
    sample_classes: Positive = setting(10, "number of classes in the grid of samples")
    samples_per_class: Positive = setting(6, "images per class in the grid of samples")
    cfg: float = setting(1.5, "classifier-free guidance of the grid of samples", ge=0)
    top_k: int = setting(0, "top-k of the grid of samples; 0: off", ge=0)
    top_p: Fraction = setting(0.0, "top-p of the grid of samples; 0: off")

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree: Any) -> Any:
        """null empties a map that an included file fills; {} would add nothing to it."""
        if not isinstance(tree, dict):
            return tree
        maps = {name for name, field in cls.model_fields.items() if field.default == {}}
        return {key: {} if value is None and key in maps else value for key, value in tree.items()}

    @model_validator(mode="after")
    def _check(self) -> StudySpec:
        listed: dict[str, Sequence[float]] = {
            "depths": self.depths,
            "seeds": self.seeds,
            "flops": self.flops,
        }
        listed |= {f"depth_seeds.{d}": seeds for d, seeds in self.depth_seeds.items()}
        for name, values in listed.items():
            if name.startswith("depth_seeds") and not values:
                raise ValueError(f"{name} is empty; give at least one seed")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} lists a value twice")
        changes = {"common": self.common} | {f"overrides.{d}": k for d, k in self.overrides.items()}
        for section, keys in changes.items():
            for key, by in (("model.depth", "depths"), ("train.seed", "seeds")):
                if key in keys:
                    raise ValueError(f"{section}: {key} is set by study.{by}; change study.{by}")
        for key, points in self.grid.items():
            self._check_swept(key, points)
        for depth, grid in self.depth_grid.items():
            for key, points in grid.items():
                if key not in self.grid:
                    raise ValueError(
                        f"depth_grid.{depth}.{key}: is not in the grid; list it in study.grid"
                    )
                self._check_swept(key, points)
        if self.budget_hours and self.device == "auto":
            raise ValueError(
                "budget_hours counts the hours of a named device; set study.device, such as h100"
            )
        return self

    def _check_swept(self, key: str, points: list[Any]) -> None:
        """Refuse a key of the grid that cannot be swept, or values that repeat."""
        if not points or len({_comparable(point) for point in points}) < len(points):
            raise ValueError(f"grid.{key} {points} is empty or lists a value twice")
        fixed = ("study", "name", "cluster", "tokenizer")
        if key in ("model.depth", "train.seed") or key.partition(".")[0] in fixed:
            raise ValueError(
                f"grid.{key}: cannot be swept; list sizes in study.depths, seeds in study.seeds; "
                "a study has one tokenizer; keys of cluster change no result"
            )
        if self.flops and key in ("train.epochs", "train.steps"):
            raise ValueError(f"grid.{key}: cannot be swept, because study.flops sets the epochs")


def _comparable(point: Any) -> float | str:
    """A value of a grid as runs use it: 1e-2 (which YAML reads as a text) and 0.01 are one."""
    try:
        return str(point) if isinstance(point, bool) else float(point)
    except (TypeError, ValueError):
        return str(point)
