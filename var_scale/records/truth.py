"""The fitted irreducible loss beside the exact one, for data whose smallest possible loss is known.

Runs of several lengths give the surface E + A N^-alpha + B D^-beta; with one length only a law in N
can be fitted, whose E also contains what more data would still gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_scale.laws.curve import fit_law
from var_scale.laws.groups import group
from var_scale.laws.law import LawFit, plain
from var_scale.laws.surface import fit_surface
from var_scale.records.optimum import DRAWS
from var_scale.records.record import RunRecord


@dataclass(frozen=True)
class Truth:
    """The loss of one scale, or of all tokens, and its law with E fitted."""

    name: str
    """scale 1, scale 2, ..., average"""
    exact: float
    """The smallest possible loss in nats per token."""
    error: float
    """Standard error of `exact`."""
    validation: float
    """What one who knows the data scores on the validation tokens; NaN where not computed."""
    losses: tuple[float, ...]
    fit: LawFit

    @property
    def inside(self) -> bool | None:
        """Whether the 95 % interval of E holds the exact value; None without a law."""
        if not self.fit.converged:
            return None
        low, high = self.fit.intervals["E"]
        return bool(low <= self.exact <= high)

    def to_json(self) -> dict[str, Any]:
        """Plain values for truth.json."""
        return {
            "name": self.name,
            "exact": self.exact,
            "error": self.error,
            "validation": plain(self.validation),
            "inside": self.inside,
            "fit": self.fit.to_json(),
        }


def compare_floor(
    healthy: Sequence[RunRecord], floor: Mapping[str, Any], seed: int = 0, draws: int = DRAWS
) -> tuple[Truth, ...]:
    """The law of every scale, and last that of all tokens.

    Args:
        healthy: runs that passed the gate, with all points of a grid.
        floor: `exact` and perhaps `validation`, each with `loss_per_scale` and `loss_avg`, as in
            STUDY/floor.json.
        seed: seed of the bootstrap.
        draws: its draws.
    """
    exact, scored = floor["exact"], floor.get("validation", {})
    runs = [run for run in healthy if len(run.loss_per_scale) == len(exact["loss_per_scale"])]

    def one(name: str, key: str, place: int | None) -> Truth:
        def value(of: Mapping[str, Any], name: str, missing: float) -> float:
            found = of.get(name, missing)
            return float(found[place] if isinstance(found, list) and place is not None else found)

        losses = [run.loss_avg if place is None else run.loss_per_scale[place] for run in runs]
        return Truth(
            name,
            value(exact, key, float("nan")),
            value(exact, f"{key}_sem", 0.0),
            value(scored, key, float("nan")),
            tuple(losses),
            _law(runs, losses, name, seed, draws),
        )

    scales = range(len(exact["loss_per_scale"]))
    return (
        *(one(f"scale {k + 1}", "loss_per_scale", k) for k in scales),
        one("average", "loss_avg", None),
    )


def _law(
    runs: Sequence[RunRecord], losses: Sequence[float], name: str, seed: int, draws: int
) -> LawFit:
    """The surface of size and data, or with one length the law of size with a floor."""
    names, sizes = [run.name for run in runs], [float(run.n) for run in runs]
    tokens = [float(run.tokens) for run in runs]
    if len(set(tokens)) > 1:
        return fit_surface(
            sizes, tokens, losses, rows=names, draws=draws, seed=seed, metric=f"loss of {name}"
        )
    points = group(names, sizes, losses)
    return fit_law(
        "power_floor",
        points.sizes,
        points.values,
        rows=points.names,
        seed=seed,
        metric=f"loss of {name}",
        repeats=points.repeats,
    )
