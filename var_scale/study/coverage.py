"""How often 95 % intervals hold the truth, by simulation on the paper's ladder and on Chinchilla-like surfaces: `python -m
var_scale.study.coverage` writes the tables of docs/laws.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from var_scale.files import replace_between
from var_scale.study.laws import law_value
from var_scale.study.power import fit_law
from var_scale.study.surface import fit_surface

DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30)
FLOOR, BETA, ALPHA = 4.5, 2.0, 0.23
"""the paper's law of the last scale: 4.5 + (2.0 N / 1e9)^-0.23"""
START, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"


def coverage(noise: float, trials: int, depths: Sequence[int] = DEPTHS, seed: int = 0) -> dict[str, float]:
    """Shares of `trials` made-up ladders, relative noise `noise`, in which the interval of E and alpha (E fitted), of alpha (E known), and
    of a new run at twice the largest size (E fitted) held the truth, and the share of fits that converged."""
    n = 73728.0 * np.asarray(depths, dtype=float) ** 3
    law = FLOOR + (BETA * n / 1e9) ** -ALPHA
    ahead = 2 * float(n.max())
    rng = np.random.default_rng(seed)
    held = dict.fromkeys(("E", "alpha", "alpha, E known", "new run"), 0)
    converged = 0
    for _ in range(trials):
        y = law * np.exp(noise * rng.standard_normal(len(n)))
        future = (FLOOR + (BETA * ahead / 1e9) ** -ALPHA) * np.exp(noise * rng.standard_normal())
        fitted = fit_law("power_floor", n.tolist(), y.tolist(), noise_floor=0)
        known = fit_law("power", n.tolist(), y.tolist(), floor=FLOOR, noise_floor=0)
        held["alpha, E known"] += known.intervals["alpha"][0] <= ALPHA <= known.intervals["alpha"][1]
        if fitted.converged:
            converged += 1
            held["E"] += fitted.intervals["E"][0] <= FLOOR <= fitted.intervals["E"][1]
            held["alpha"] += fitted.intervals["alpha"][0] <= ALPHA <= fitted.intervals["alpha"][1]
            at = fitted.at(ahead)
            held["new run"] += at.low <= future <= at.high
    return {name: count / (trials if "known" in name else max(converged, 1)) for name, count in held.items()} | {
        "converged": converged / trials}  # fmt: skip


def table(trials: int) -> str:
    """The table of docs/laws.md."""
    columns = ("E", "alpha", "alpha, E known", "new run", "converged")
    lines = [f"| noise of a run | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for seed, noise in enumerate((5e-4, 1e-3, 2e-3, 5e-3)):
        found = coverage(noise, trials, seed=seed)
        lines.append(f"| {100 * noise:g} % | {' | '.join(f'{100 * found[name]:.1f} %' for name in columns)} |")
    return "\n".join(lines)


SURFACE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
DESIGNS = ((4, 3, 2e-3), (5, 5, 5e-3), (12, 10, 3e-3))
"""sizes, lengths, relative noise of a run"""


def surface_coverage(sizes: int, lengths: int, noise: float, trials: int, seed: int = 0) -> dict[str, float]:
    """The same for `chinchilla`: every size trained for every length, bootstrap of 100 draws; a new run at twice the largest of both."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(5e7, 5e9, sizes), lengths)
    d = np.tile(np.geomspace(1e9, 1e11, lengths), sizes)
    truth = {"E": SURFACE["E"], "alpha": SURFACE["alpha"], "beta": SURFACE["beta"], "split": 0.37 / 0.71}
    held, converged = dict.fromkeys((*truth, "new run"), 0), 0
    ahead = float(law_value("chinchilla", SURFACE, 1e10, 2e11))
    for _ in range(trials):
        fit = fit_surface(n, d, law_value("chinchilla", SURFACE, n, d) * np.exp(noise * rng.standard_normal(len(n))), draws=100)
        future = ahead * np.exp(noise * rng.standard_normal())
        if not fit.converged:
            continue
        converged += 1
        for name, value in truth.items():
            held[name] += fit.intervals[name][0] <= value <= fit.intervals[name][1]
        at = fit.at(1e10, d=2e11)
        held["new run"] += at.low <= future <= at.high
    return {name: count / max(converged, 1) for name, count in held.items()} | {"converged": converged / trials}


def surface_table(trials: int) -> str:
    """The second table of docs/laws.md."""
    columns = ("E", "alpha", "beta", "split", "new run", "converged")
    lines = [f"| runs | noise of a run | {' | '.join(columns)} |", f"|---|---:|{'---:|' * len(columns)}"]
    for sizes, lengths, noise in DESIGNS:
        found = surface_coverage(sizes, lengths, noise, trials)
        shares = " | ".join(f"{100 * found[name]:.1f} %" for name in columns)
        lines.append(f"| {sizes} sizes x {lengths} lengths | {100 * noise:g} % | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    text = (f"{table(trials)}\n\n{trials} ladders a row.\n\nOf surfaces (`chinchilla`):\n\n{surface_table(trials // 3)}\n\n"
            f"{trials // 3} studies a row.")  # fmt: skip
    page = Path(__file__).parents[2] / "docs" / "laws.md"
    page.write_text(replace_between(page.read_text(), START, END, text))
