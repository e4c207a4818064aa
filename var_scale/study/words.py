"""Numbers, intervals and verdicts of a study in words."""

from __future__ import annotations

import math

from var_scale.study.analyse import StudyResult
from var_scale.study.holdout import HoldOut

WEAK = 2.0
"""prediction intervals wider than this many steps of the ladder make a weak hold-out test"""


def assumed(result: StudyResult, metric: str) -> str:
    floor = result.floors[metric]
    return f"With an assumed irreducible part E = {floor:g}" if floor else "If nothing of it is irreducible (E = 0)"


def octaves(result: StudyResult) -> float:
    """Range of N as a power of two."""
    sizes = [run.size(result.size) for run in result.gate.kept]
    return math.log2(max(sizes) / min(sizes)) if sizes else 0.0


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def span(interval: tuple[float, float] | None, digits: int = 4) -> str:
    """low to high; an open end where the data do not bound it."""
    if not interval or any(map(math.isnan, interval)):
        return "n/a"
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}" if math.isfinite(high) else f"{low:.{digits}f} or more (not bounded)"


def verdict(held: HoldOut) -> str:
    """One phrase on a hold-out test."""
    if held.prediction is None:
        return f"not tested: {held.reason}"
    if held.inside:
        return "inside the interval"
    return "**outside, above the interval**" if held.measured > held.prediction.high else "**outside, below the interval**"


def free_floor(result: StudyResult, metric: str) -> str:
    """What the points say about exponent and floor when no floor is assumed."""
    fit = result.fits[metric, "power_floor"]
    if not fit.converged:
        return f"with E left free there is no fit ({fit.reason})"
    low, high = fit.intervals["E"]
    known = "" if low > 0 or high < 0.5 * min(fit.y) else "; these points do not determine E, so they do not determine the exponent either"
    return f"with E left free it is {span(fit.intervals['alpha'])} and E {span(fit.intervals['E'], 2)}{known}"


def held_sentence(held: HoldOut) -> str:
    """The hold-out test in words: miss, size of the miss against the step it had to predict, and what the test was worth."""
    text = (f"Held out, {', '.join(held.held)} is predicted within {100 * abs(held.relative_error):.2f} %, "
            f"{100 * held.gain_fraction:.0f} % of the gain from the next smaller size ({verdict(held)}).")  # fmt: skip
    if held.inside and held.fit and abs(held.relative_error) < held.fit.residual_sd / 2:
        text += f" So small a miss is luck: the law misses its own points by {100 * held.fit.residual_sd:.2f} %."
    if held.inside and held.width_fraction > WEAK:
        text += f" The interval is {held.width_fraction:.1f} times as wide as that gain: a weak test that only a large miss fails."
    return text
