"""Which runs to make next: the information that each would add to a law, against its cost.

A law y = E + a x^-alpha with relative noise s per run has the Fisher information J'J / s^2, where J
holds the derivatives of ln y by (E, ln a, alpha), or with an assumed E those of ln (y - E) by
(ln a, alpha). Its inverse tells how wide the interval of alpha would be before a run is made. Runs
are added one at a time, the one that narrows alpha most for its cost first, and then exchanged as
long as that helps; repeated sizes count as seeds. The advice trusts the form: it does not consider
a bend of the law over the sizes, so keep a largest size that the law has not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.forms import LEVEL, Array, t_factor
from var_scale.laws.law import LawFit


@dataclass(frozen=True)
class Candidate:
    """A possible run: its name, size x, and cost in any unit, such as device-hours."""

    name: str
    x: float
    cost: float


Chosen = Counter[Candidate]


@dataclass(frozen=True)
class Advice:
    """What to run next."""

    runs: tuple[tuple[Candidate, int], ...]
    """Candidates and how many of each, largest first."""
    cost: float
    half_before: float
    """Half the 95 % interval of alpha from the runs so far, by the information of the law."""
    half_after: float
    """The same with the advised runs."""


def information_rows(law: LawFit, x: Array) -> Array:
    """Derivatives of ln y by (E, ln a, alpha), for `power` by the last two, at x: (n, parameters).

    ln a is the level at the middle of the sizes, which makes it nearly independent of alpha.
    """
    p = law.params
    middle = math.exp(float(np.log(law.x).mean()))
    decay = p["a"] * x ** -p["alpha"]
    logs = np.log(x / middle)
    value = p["E"] + decay
    if law.form == "power_floor":
        return np.stack([1 / value, decay / value, -decay * logs / value], axis=1)
    return np.stack([decay / value, -decay * logs / value], axis=1)


def information(law: LawFit, x: Array, sd: float) -> Array:
    """J'J of points x with this noise over its square: (parameters, parameters)."""
    jacobian = information_rows(law, x)
    return np.asarray(jacobian.T @ jacobian / sd**2)


def half_width(law: LawFit, total: Array, more: int) -> float:
    """Half the 95 % interval of alpha from the information matrix of the points and `more` runs.

    Infinite where it does not bound alpha: its matrix has an inverse that would be rounding errors
    (condition above 1e14).
    """
    if np.linalg.cond(total) > 1e14:
        return math.inf
    variance = float(np.linalg.inv(total)[-1, -1])
    if variance <= 0:
        return math.inf
    return t_factor(LEVEL, law.noise.point.freedom + more) * math.sqrt(variance)


def advise(law: LawFit, candidates: Sequence[Candidate], budget: float, at_most: int = 8) -> Advice:
    """Runs within `budget` that give the narrowest interval of alpha.

    Args:
        budget: in the unit of the candidates' cost.
        at_most: largest number of runs of one candidate.

    Raises:
        UserError: code `laws.advise-law` for a law that is not a converged power or power_floor,
            `laws.advise-candidates` for no candidates or a cost that is not positive.
    """
    if not law.converged or law.form not in ("power", "power_floor"):
        raise UserError(
            f"next: a law of one variable is needed ({law.reason or law.form}); run the sizes of "
            "the study first",
            code="laws.advise-law",
        )
    if not candidates or any(not 0 < c.cost < math.inf for c in candidates):
        raise UserError(
            "next: give at least one candidate, each with a cost above 0",
            code="laws.advise-candidates",
        )
    each = {c: information(law, np.array([c.x]), law.noise.run.sd) for c in candidates}
    so_far = information(law, np.asarray(law.x), law.noise.point.sd)

    def half(chosen: Chosen) -> float:
        total = so_far + sum((n * each[c] for c, n in chosen.items()), np.zeros_like(so_far))
        return half_width(law, total, sum(chosen.values()))

    def fits(chosen: Chosen) -> bool:
        return _cost(chosen) <= budget and all(n <= at_most for n in chosen.values())

    chosen = _exchanged(_greedy(candidates, half, fits), candidates, half, fits)
    runs = tuple(sorted(chosen.items(), key=lambda pair: -pair[0].x))
    return Advice(runs, _cost(chosen), half(Counter()), half(chosen))


def _cost(chosen: Chosen) -> float:
    return sum(n * c.cost for c, n in chosen.items())


def _greedy(
    candidates: Sequence[Candidate],
    half: Callable[[Chosen], float],
    fits: Callable[[Chosen], bool],
) -> Chosen:
    """One run after another, always the one that gains most for its cost."""
    chosen: Chosen = Counter()
    while True:
        possible = [c for c in candidates if fits(chosen + Counter([c]))]
        gains = [((half(chosen) - half(chosen + Counter([c]))) / c.cost, c) for c in possible]
        gain, best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
        if best is None or not gain > 0:
            return chosen
        chosen += Counter([best])


def _exchanged(
    chosen: Chosen,
    candidates: Sequence[Candidate],
    half: Callable[[Chosen], float],
    fits: Callable[[Chosen], bool],
) -> Chosen:
    """Any run exchanged for any other, or added, as long as the interval becomes narrower."""
    for _ in range(100):
        best_half, best_swap = half(chosen), None
        for out in [*chosen, None]:
            for new in candidates:
                swapped = chosen - Counter([out] if out else []) + Counter([new])
                if new != out and fits(swapped) and half(swapped) < best_half * (1 - 1e-9):
                    best_half, best_swap = half(swapped), swapped
        if best_swap is None:
            break
        chosen = best_swap
    return chosen
