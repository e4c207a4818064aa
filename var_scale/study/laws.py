"""The law forms, and the frozen result of a fit with its predictions.

power          L(x) = E + a x^-alpha, E fixed (0 unless given); the paper writes (beta X)^-alpha with X = x / unit, a = (beta / unit)^-alpha
power_floor    the same with E >= 0 free
chinchilla     L(N, D) = E + A N^-alpha + B D^-beta  (Hoffmann et al. 2022, approach 3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from var_scale.errors import UserError

Form = Literal["power", "power_floor", "chinchilla"]
Status = Literal["converged", "not-converged"]
Array = NDArray[np.float64]
UNITS = {"N": 1e9, "C": 1e15}
PARAMETERS: dict[str, int] = {"power": 2, "power_floor": 3, "chinchilla": 5}
LEVEL = 0.95


@dataclass(frozen=True)
class Prediction:
    """A law at one x with its interval for one new run (metric's own unit: nats, or a fraction)."""

    x: float
    value: float
    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class LawFit:
    """One fitted law. Ask `converged` before using it: a fit that did not converge has a reason and no predictions."""

    form: Form
    metric: str
    variable: str
    """N (parameters), C (training FLOPs), N,D, or the name of another column"""
    status: Status
    reason: str = ""
    params: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % confidence intervals of `params`; infinite or zero where the data do not bound it"""
    objective: float = math.nan
    r: float = math.nan
    """Pearson correlation of ln x and ln (L - E): descriptive, it hardly depends on whether the law is right"""
    residuals: tuple[float, ...] = ()
    """ln measured - ln fitted (of L - E for the power law, else of L), in row order"""
    residual_sd: float = math.nan
    """root of the sum of squares over the degrees of freedom, n - parameters; not below `noise_floor` in intervals"""
    noise_floor: float = 0.0
    rows: tuple[str, ...] = ()
    excluded: tuple[tuple[str, str, str], ...] = ()
    """(run, code, sentence)"""
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    audit: dict[str, Any] = field(default_factory=dict)
    """gradient norm, active bounds, agreement of starts"""
    draws: tuple[tuple[float, ...], ...] = field(default=(), repr=False, compare=False)
    """bootstrap draws (E, a, alpha, sd) of power_floor"""

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    @property
    def sd(self) -> float:
        """Residual standard deviation used in intervals."""
        return max(self.residual_sd, self.noise_floor)

    @property
    def equation(self) -> str:
        """The law as one line of text."""
        if not self.converged:
            return f"not converged: {self.reason}"
        p = self.params
        if self.form == "chinchilla":
            return f"L = {p['E']:.4f} + {p['A']:.4g} N^-{p['alpha']:.4f} + {p['B']:.4g} D^-{p['beta']:.4f}"
        floor = f"{p['E']:.4f} + " if p["E"] > 0 else ""
        middle = math.exp(float(np.log(self.x).mean()))  # a small exponent puts the paper's beta beyond reading; this never is
        text = f"{p['a'] * middle ** -p['alpha']:.4g} ({self.variable}/{middle:.3g})^-{p['alpha']:.4f}"
        return f"{self.metric} = {floor}{text}".replace("e+0", "e").replace("e+", "e")

    @property
    def freedom(self) -> int:
        """Degrees of freedom left for the error estimate: points - parameters."""
        return len(self.x) - PARAMETERS[self.form]

    def local_exponents(self) -> list[float]:
        """-d ln (L - E) / d ln x between neighbouring points."""
        u, v = np.log(np.asarray(self.x)), np.log(np.asarray(self.y) - self.params.get("E", 0.0))
        order = np.argsort(u)
        return [float(a) for a in -np.diff(v[order]) / np.diff(u[order])]

    def curvature(self) -> tuple[float, float]:
        """A bend of the power law: coefficient of (ln x)^2 beside the straight line in ln (L - E), and its two-sided p-value
        (Student's t, n - 3 degrees of freedom). NaN, NaN with fewer than four points."""
        from scipy.stats import t

        n = len(self.x)
        if self.form != "power" or n < 4:
            return math.nan, math.nan
        u = np.log(np.asarray(self.x))
        basis = np.stack([np.ones(n), u, (u - u.mean()) ** 2], axis=1)
        q, r = np.linalg.qr(basis)
        weights = q.T @ np.asarray(self.residuals)
        left = np.asarray(self.residuals) - q @ weights
        sd = max(math.sqrt(float(left @ left) / (n - 3)), self.noise_floor)
        bend, error = weights[2] / r[2, 2], sd / abs(r[2, 2])
        return float(bend), float(2 * t.sf(abs(bend) / error, n - 3))

    def predict(self, x: float | Sequence[float] | Array) -> Array:
        """The fitted law at x (parameters or FLOPs)."""
        self._need()
        p = self.params
        return np.asarray(p["E"] + p["a"] * np.asarray(x, dtype=float) ** -p["alpha"])

    def interval(self, x: float | Sequence[float] | Array, level: float = LEVEL, new_run: bool = True) -> tuple[Array, Array]:
        """Low and high at each x: of one new run (prediction), or of the law itself (`new_run=False`, confidence)."""
        self._need()
        at = np.atleast_1d(np.asarray(x, dtype=float))
        return self._t_interval(at, level, new_run) if self.form == "power" else self._draw_interval(at, level, new_run)

    def at(self, x: float, level: float = LEVEL) -> Prediction:
        """Prediction of one new run at x."""
        low, high = self.interval(x, level)
        return Prediction(float(x), float(self.predict(x)), float(low[0]), float(high[0]), level)

    def _t_interval(self, at: Array, level: float, new_run: bool) -> tuple[Array, Array]:
        """Exact for normal residuals: u +- t_{n-2} s sqrt([1] + 1/n + (ln x - m)^2 / Sxx) with u = ln (L - E)."""
        from scipy.stats import t

        log_x, p = np.log(np.asarray(self.x)), self.params
        spread = ((log_x - log_x.mean()) ** 2).sum()
        n = len(log_x)
        scale = np.sqrt(float(new_run) + 1 / n + (np.log(at) - log_x.mean()) ** 2 / spread)
        half = t.ppf(0.5 + level / 2, n - 2) * self.sd * scale
        middle = p["a"] * at ** -p["alpha"]
        with np.errstate(over="ignore"):
            return p["E"] + middle * np.exp(-half), p["E"] + middle * np.exp(half)

    def _draw_interval(self, at: Array, level: float, new_run: bool) -> tuple[Array, Array]:
        """Percentiles of the bootstrap laws; a new run adds a relative error of the drawn size."""
        floor, a, alpha, sd = (column[:, None] for column in np.asarray(self.draws).T)
        values = floor + a * at[None, :] ** -alpha
        if new_run:
            noise = np.random.default_rng(len(self.draws)).standard_normal(values.shape)
            values = values * np.exp(sd * noise)
        tail = 50 * (1 - level)
        low, high = np.percentile(values, [tail, 100 - tail], axis=0)
        return low, high

    def _need(self) -> None:
        if not self.converged:
            raise UserError(f"{self.metric}: the {self.form} fit did not converge ({self.reason}), so it predicts nothing")
        if self.form == "chinchilla":
            raise UserError("the chinchilla law has two variables; evaluate it with surface.evaluate")

    def to_json(self) -> dict[str, Any]:
        """Plain values for fit.json; a number that is not finite becomes null."""
        names = ("form", "metric", "variable", "status", "reason", "params", "intervals", "objective", "r", "residuals", "residual_sd",
                 "noise_floor", "rows", "excluded", "x", "y", "audit")  # fmt: skip
        return {name: plain(getattr(self, name)) for name in names}


def plain(value: Any) -> Any:
    """JSON-safe copy: tuples become lists, NaN and infinities null, numpy scalars Python numbers."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def paper_beta(a: float, alpha: float, unit: float) -> float:
    """beta of (beta X)^-alpha with X = x / unit, from a x^-alpha: beta = unit a^(-1/alpha). NaN beyond the range of a float."""
    exponent = math.log(unit) - math.log(a) / alpha
    return math.exp(exponent) if abs(exponent) < 700 else math.nan
