"""Whether two groups of runs follow one law: kernels on or off, ZeRO or FSDP, two data sets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from var_scale.errors import UserError
from var_scale.study.laws import LEVEL, LawFit, t_factor


@dataclass(frozen=True)
class Comparison:
    """Two power laws of the same metric and floor, tested as one family of straight lines in logs (analysis of covariance)."""

    p_same: float
    """p-value of one common law: an F test of both lines against one"""
    p_exponent: float
    """p-value of a common exponent, levels free"""
    ratio: float
    """second over first, of y - E, at the middle of all sizes, with a common exponent"""
    low: float
    high: float
    """its 95 % interval"""
    freedom: int

    def sentence(self, one: str = "the first", two: str = "the second") -> str:
        """What a reader needs."""
        change = " to ".join(f"{100 * (end - 1):+.2f} %" for end in (self.low, self.high))
        return (f"{two} over {one}: {100 * (self.ratio - 1):+.2f} % (95 % {change}) at the same size; p = {self.p_same:.3g} that both "
                f"follow one law, p = {self.p_exponent:.3g} that the exponents are equal ({self.freedom} degrees of freedom)")  # fmt: skip


def compare(one: LawFit, two: LawFit) -> Comparison:
    """Test two converged fits of the form power. The noise is taken as equal in both, and at least the larger `noise_floor`.

    UserError: another form, floor or metric; a fit that did not converge; fewer than five points in all.
    """
    from scipy.special import fdtrc

    for law in (one, two):
        if law.form != "power" or not law.converged:
            raise UserError(f"compare: two converged fits of the form power are needed ({law.reason or law.form})")
    if one.params["E"] != two.params["E"] or one.metric != two.metric:
        raise UserError("compare: the two laws must be of the same metric with the same floor")
    floor = one.params["E"]
    u = [np.log(np.asarray(law.x)) for law in (one, two)]
    v = [np.log(np.asarray(law.y) - floor) for law in (one, two)]
    n = len(u[0]) + len(u[1])
    if n < 5:
        raise UserError(f"compare: {n} points in all; at least 5 are needed")
    group = np.concatenate([np.zeros(len(u[0])), np.ones(len(u[1]))])
    x, y = np.concatenate(u), np.concatenate(v)
    x = x - x.mean()
    ones = np.ones(n)
    root = np.sqrt(np.concatenate([law.weights(np.asarray(law.x)) for law in (one, two)]))
    designs = ((ones, x, group, group * x), (ones, x, group), (ones, x))
    full, parallel, single = (root[:, None] * np.stack(columns, 1) for columns in designs)
    y = y * root
    rss = []
    for design in (full, parallel, single):
        q, _ = np.linalg.qr(design)
        rest = y - q @ (q.T @ y)
        rss.append(float(rest @ rest))
    freedom = n - 4
    noise = max(one.noise_floor, two.noise_floor)
    variance = max(rss[0] / freedom, noise**2)
    if variance == 0:
        raise UserError("compare: the points lie on their laws exactly, so there is no noise to judge a difference by; is it one table?")
    p_same = float(fdtrc(2, freedom, max(rss[2] - rss[0], 0) / 2 / variance))
    p_exponent = float(fdtrc(1, freedom, max(rss[1] - rss[0], 0) / variance))
    q, r = np.linalg.qr(parallel)
    weights = np.linalg.solve(r, q.T @ y)
    inverse = np.linalg.inv(r)
    spread = math.sqrt(max(rss[1] / (n - 3), noise**2) * float((inverse @ inverse.T)[2, 2]))
    half = t_factor(LEVEL, n - 3) * spread
    shift = float(weights[2])
    return Comparison(p_same, p_exponent, math.exp(shift), math.exp(shift - half), math.exp(shift + half), freedom)
