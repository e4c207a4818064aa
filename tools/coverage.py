"""How often 95 % intervals hold the truth, by simulation.

On the ladder of the VAR paper and on surfaces like Chinchilla's.
`python -m tools.coverage [TRIALS]` writes the tables of docs/explanation/intervals.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var_scale.files import replace_between
from var_scale.laws.curve import fit_law
from var_scale.laws.forms import Array, law_value
from var_scale.laws.groups import group
from var_scale.laws.noise import noise_trend
from var_scale.laws.surface import fit_surface
from var_scale.laws.surface_draws import sizes_tell

DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30)
FLOOR, BETA, ALPHA = 4.5, 2.0, 0.23
"""The paper's law of the last scale: 4.5 + (2.0 N / 1e9)^-0.23."""
SURFACE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
SPLIT = SURFACE["beta"] / (SURFACE["alpha"] + SURFACE["beta"])
FEW, SEEDS = (6, 10, 14, 20, 30), (3, 3, 3, 1, 1)


class Noise(NamedTuple):
    """The noise of simulated runs, relative to y."""

    size: float
    """Standard deviation, of the largest run if it grows."""
    growth: float = 1.0
    """That of the largest run over that of the smallest; a power of the size between them."""
    heavy: bool = False
    """Student's t with 3 degrees of freedom instead of a normal distribution."""
    common: float = 0.0
    """Standard deviation of an error that the runs of a size share."""

    def draw(self, rng: np.random.Generator, n: Array, largest: float, smallest: float) -> Array:
        """Relative errors of runs of the sizes n, (n,)."""
        steep = np.log(self.growth) / np.log(largest / smallest)
        sd = self.size * (n / largest) ** steep
        z = rng.standard_t(3, len(n)) / np.sqrt(3) if self.heavy else rng.standard_normal(len(n))
        sizes, size = np.unique(n, return_inverse=True)
        return np.asarray(sd * z + self.common * rng.standard_normal(len(sizes))[size])


class Ladder(NamedTuple):
    """A case of the first table."""

    label: str
    noise: Noise
    depths: Sequence[int] = DEPTHS
    alpha: float = ALPHA
    seeds: Sequence[int] = ()
    """Runs of each depth; one of each unless given."""


class Design(NamedTuple):
    """A case of the second table."""

    sizes: int
    lengths: int
    noise: Noise
    triangle: bool = False
    """Whether larger sizes have fewer of the longer lengths."""


LADDERS = (
    *(Ladder(f"{100 * noise:g} %", Noise(noise)) for noise in (5e-4, 1e-3, 2e-3, 5e-3)),
    Ladder("0.2 %, five depths", Noise(2e-3), FEW),
    Ladder("0.2 %, heavy tails", Noise(2e-3, heavy=True)),
    Ladder("0.2 % at d30, a tenth of it at d6", Noise(2e-3, growth=10)),
    Ladder("0.1 %, exponent 0.05", Noise(1e-3), DEPTHS, 0.05),
    Ladder("0.2 %, seeds", Noise(2e-3), FEW, seeds=SEEDS),
    Ladder("0.2 % and 0.1 % common to a size, seeds", Noise(2e-3, common=1e-3), FEW, seeds=SEEDS),
    Ladder("0.2 % and 0.2 % common to a size, seeds", Noise(2e-3, common=2e-3), FEW, seeds=SEEDS),
    Ladder("0.2 % and 0.4 % common to a size, seeds", Noise(2e-3, common=4e-3), FEW, seeds=SEEDS),
)
DESIGNS = (
    Design(3, 3, Noise(2e-3)),
    Design(4, 3, Noise(2e-3)),
    Design(3, 3, Noise(2e-3, common=5e-3)),
    Design(4, 3, Noise(2e-3, common=5e-3)),
    Design(5, 5, Noise(5e-3)),
    Design(12, 10, Noise(3e-3)),
    Design(6, 5, Noise(3e-3), triangle=True),
    Design(5, 5, Noise(3e-3, heavy=True)),
    Design(5, 5, Noise(2e-3, common=5e-3)),
    Design(8, 4, Noise(3e-3, common=3e-3)),
)
START, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
Shares = dict[str, float]


def coverage(ladder: Ladder, trials: int, seed: int = 0) -> Shares:
    """Shares of simulated ladders in which an interval held the truth.

    Returns:
        Shares for E and alpha with E fitted, for alpha with E known, and for a new run at twice the
        largest size with E fitted; the share of fits that converged, and of those whose noise is
        reported to grow, or to be known not to.
    """
    depths = np.repeat(ladder.depths, ladder.seeds or 1)
    n, names = 73728.0 * depths.astype(float) ** 3, [str(run) for run in range(len(depths))]
    ends = float(n.max()), float(n.min())
    ahead = np.array([2 * ends[0]])
    law, later = (FLOOR + (BETA * x / 1e9) ** -ladder.alpha for x in (n, ahead))
    rng = np.random.default_rng(seed)
    held = dict.fromkeys(("E", "alpha", "alpha, E known", "new run"), 0)
    converged = grows = steady = 0
    for _ in range(trials):
        y = law * np.exp(ladder.noise.draw(rng, n, *ends))
        future = float((later * np.exp(ladder.noise.draw(rng, ahead, *ends)))[0])
        points = group(names, n, y)
        given: dict[str, Any] = {"noise_floor": 0, "repeats": points.repeats}
        fitted = fit_law("power_floor", points.sizes, points.values, **given)
        known = fit_law("power", points.sizes, points.values, floor=FLOOR, **given)
        held["alpha, E known"] += _inside(known.intervals["alpha"], ladder.alpha)
        if fitted.converged:
            converged += 1
            trend = noise_trend(fitted)
            grows += trend.grows
            steady += not (trend.grows or trend.undecided)
            held["E"] += _inside(fitted.intervals["E"], FLOOR)
            held["alpha"] += _inside(fitted.intervals["alpha"], ladder.alpha)
            at = fitted.at(float(ahead[0]))
            held["new run"] += at.low <= future <= at.high
    return {
        name: count / (trials if "known" in name else max(converged, 1))
        for name, count in held.items()
    } | {
        "converged": converged / trials,
        "noise grows": grows / max(converged, 1),
        "noise does not grow": steady / max(converged, 1),
    }


def surface_coverage(design: Design, trials: int, seed: int = 0) -> Shares:
    """The same for `chinchilla`, with every size trained for every length, or a triangle of these.

    With 200 bootstrap draws, and a new run at twice the largest size and length.
    """
    rng = np.random.default_rng(seed)
    size, length = (k.ravel() for k in np.indices((design.sizes, design.lengths)))
    if design.triangle:
        kept = size / design.sizes + length / design.lengths < 1.2
        size, length = size[kept], length[kept]
    n = np.geomspace(5e7, 5e9, design.sizes)[size]
    d = np.geomspace(1e9, 1e11, design.lengths)[length]
    truth = {name: SURFACE[name] for name in ("E", "alpha", "beta")} | {"split": SPLIT}
    held, converged = dict.fromkeys((*truth, "new run"), 0), 0
    law, ahead = law_value("chinchilla", SURFACE, n, d), np.array([1e10])
    later = float(law_value("chinchilla", SURFACE, 1e10, 2e11))
    for trial in range(trials):
        y = law * np.exp(design.noise.draw(rng, n, 5e9, 5e7))
        fit = fit_surface(n, d, y, draws=200, seed=trial)
        future = later * float(np.exp(design.noise.draw(rng, ahead, 5e9, 5e7))[0])
        if fit.converged:
            converged += 1
            for name, value in truth.items():
                held[name] += _inside(fit.intervals[name], value)
            at = fit.at(1e10, d=2e11)
            held["new run"] += at.low <= future <= at.high
    shares = {name: count / max(converged, 1) for name, count in held.items()}
    return shares | {"converged": converged / trials}


def _inside(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def table(trials: int) -> str:
    """The table of ladders."""
    rows = [(ladder.label, coverage(ladder, trials, seed=k)) for k, ladder in enumerate(LADDERS)]
    return _table(("noise of a run",), rows)


def surface_table(trials: int) -> str:
    """The table of surfaces."""
    return _table(
        ("runs", "noise of a run"),
        [(_described(design), surface_coverage(design, trials)) for design in DESIGNS],
    )


def _described(design: Design) -> str:
    """The runs and their noise, as two cells."""
    shape = ", triangle" if design.triangle else ""
    noise = design.noise
    tails = ", heavy tails" if noise.heavy else ""
    common = f" and {100 * noise.common:g} % common to a size" if noise.common else ""
    few = "" if sizes_tell(range(design.sizes)) else ", marked"
    return (
        f"{design.sizes} sizes x {design.lengths} lengths{shape}{few} | "
        f"{100 * noise.size:g} %{tails}{common}"
    )


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Shares]]) -> str:
    columns = list(rows[0][1])
    rule = f"|{'---|' * len(heads)}{'---:|' * len(columns)}"
    lines = [f"| {' | '.join((*heads, *columns))} |", rule]
    for label, shares in rows:
        lines.append(f"| {label} | {' | '.join(f'{100 * v:.1f} %' for v in shares.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    text = (
        f"{table(trials)}\n\n{trials} ladders per row.\n\nOf surfaces (`chinchilla`):\n\n"
        f"{surface_table(trials // 2)}\n\n{trials // 2} studies per row."
    )
    page = Path(__file__).parents[1] / "docs" / "explanation" / "intervals.md"
    page.write_text(replace_between(page.read_text(), START, END, text))
