"""Which runs next: the information that each would add to a law, for what it costs.

A law y = E + a x^-alpha with relative noise s of a run has the Fisher information J'J / s^2, J the derivatives of ln y by (E, ln a,
alpha), or with E assumed of ln (y - E) by (ln a, alpha). Its inverse says how wide the interval of alpha would be, before a run is made.
Runs are added one at a time, the one that narrows alpha most for its cost first, then exchanged as long as that helps; repeated sizes count
as seeds. It trusts the form: a bend of the law over the sizes is not counted, so keep a largest size that the law has not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from var_scale.errors import UserError
from var_scale.study.laws import LEVEL, PARAMETERS, Array, LawFit, t_factor


@dataclass(frozen=True)
class Candidate:
    """A run that could be made: its name, size x, and cost in any unit, such as device-hours."""

    name: str
    x: float
    cost: float


@dataclass(frozen=True)
class Advice:
    """What to run next."""

    runs: tuple[tuple[Candidate, int], ...]
    """candidates and how many of each, largest first"""
    cost: float
    half_before: float
    """half the 95 % interval of alpha that the runs so far give, by the law's information"""
    half_after: float

    def lines(self, unit: str = "device-hours") -> list[str]:
        """What a reader needs."""
        chosen = [f"{count} x {c.name} ({c.cost:.3g} {unit} each)" for c, count in self.runs]
        runs = f"next: {', '.join(chosen)}; {self.cost:.3g} {unit}"
        return [runs if chosen else "next: nothing that fits the budget narrows the interval",
                f"interval of the exponent: ±{self.half_before:.2g} now, ±{self.half_after:.2g} expected with them"]  # fmt: skip


def information_rows(law: LawFit, x: Array) -> Array:
    """Derivatives of ln y by (E, ln a, alpha), of `power` by the last two, at the points `x`: (n, parameters)."""
    p = law.params
    middle = math.exp(float(np.log(law.x).mean()))
    decay = p["a"] * x ** -p["alpha"]
    logs = np.log(x / middle)
    value = p["E"] + decay
    if law.form == "power_floor":
        return np.stack([1 / value, decay / value, -decay * logs / value], axis=1)
    return np.stack([decay / value, -decay * logs / value], axis=1)


def information(law: LawFit, x: Array) -> Array:
    """J'J of the points `x` over the noise of a run, squared."""
    jacobian = information_rows(law, x)
    return np.asarray(jacobian.T @ jacobian / law.sd**2)


def half_width(law: LawFit, total: Array, points: int) -> float:
    """Half the 95 % interval of alpha from an information matrix of so many points; infinite where it does not bound alpha."""
    if np.linalg.cond(total) > 1e14 or points <= PARAMETERS[law.form]:
        return math.inf
    variance = float(np.linalg.inv(total)[-1, -1])
    return t_factor(LEVEL, points - PARAMETERS[law.form]) * math.sqrt(variance) if variance > 0 else math.inf


def advise(law: LawFit, candidates: Sequence[Candidate], budget: float, at_most: int = 8) -> Advice:
    """Runs within `budget` (of the candidates' cost) that give the narrowest interval of alpha; at most `at_most` of one size.

    UserError: a law that did not converge or has two variables, no candidates, a cost that is not positive.
    """
    if not law.converged or law.form == "chinchilla":
        raise UserError(f"next: a law of one variable is needed ({law.reason or law.form}); run the sizes of the study first")
    if not candidates or any(not 0 < c.cost < math.inf for c in candidates):
        raise UserError("next: give at least one candidate, each with a cost above 0")
    each = {c: information(law, np.array([c.x])) for c in candidates}
    so_far, points = information(law, np.asarray(law.x)), len(law.x)

    def half(chosen: Counter[Candidate]) -> float:
        total = so_far + sum((n * each[c] for c, n in chosen.items()), np.zeros_like(so_far))
        return half_width(law, total, points + sum(chosen.values()))

    def cost(chosen: Counter[Candidate]) -> float:
        return sum(n * c.cost for c, n in chosen.items())

    chosen: Counter[Candidate] = Counter()
    while True:  # greedy: the most for the cost
        fits = [c for c in candidates if cost(chosen) + c.cost <= budget and chosen[c] < at_most]
        gains = [((half(chosen) - half(chosen + Counter([c]))) / c.cost, c) for c in fits]
        gain, best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
        if best is None or not gain > 0:
            break
        chosen += Counter([best])
    for _ in range(100):  # exchanges: any run for any other that still fits
        best_half, best_swap = half(chosen), None
        for out in [*chosen, None]:
            for new in candidates:
                swapped = chosen - Counter([out] if out else []) + Counter([new])
                if new != out and cost(swapped) <= budget and swapped[new] <= at_most and half(swapped) < best_half * (1 - 1e-9):
                    best_half, best_swap = half(swapped), swapped
        if best_swap is None:
            break
        chosen = best_swap
    runs = tuple(sorted(chosen.items(), key=lambda pair: -pair[0].x))
    return Advice(runs, cost(chosen), half(Counter()), half(chosen))
