"""How often 95 % intervals hold the truth, by simulation on the paper's ladder: `python -m var_scale.study.coverage` writes the table of
docs/laws.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from var_scale.files import replace_between
from var_scale.study.power import fit_law

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
    for noise in (5e-4, 1e-3, 2e-3, 5e-3):
        found = coverage(noise, trials)
        lines.append(f"| {100 * noise:g} % | {' | '.join(f'{100 * found[name]:.1f} %' for name in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    text = f"{table(trials)}\n\n{trials} ladders a row."
    page = Path(__file__).parents[2] / "docs" / "laws.md"
    page.write_text(replace_between(page.read_text(), START, END, text))
