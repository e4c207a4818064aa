"""The law forms, and the frozen result of a fit with its predictions.

power          L(x) = E + a x^-alpha, E fixed (0 unless given); the paper writes (beta X)^-alpha with X = x / unit, a = (beta / unit)^-alpha
power_floor    the same with E >= 0 free
broken_power   L(x) = E + a (x/x_break)^-alpha_1 ((1 + (x/x_break)^(1/width)) / 2)^(-(alpha_2 - alpha_1) width), E fixed
               (Caballero et al. 2023, one break): exponent alpha_1 far below the break, alpha_2 far above it
chinchilla     L(N, D) = E + A N^-alpha + B D^-beta  (Hoffmann et al. 2022, approach 3)
repeated       L(N, D, U) = E + A N^-alpha + B D'^-beta, of D tokens only U different: D' = U + U R (1 - exp(-(D/U - 1) / R)), R = r_star
               (Muennighoff et al. 2023): r_star passes over the data are worth about as much as as many with new data, then they fade
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from var_scale.errors import UserError

Form = Literal["power", "power_floor", "broken_power", "chinchilla", "repeated"]
FORMS: tuple[Form, ...] = ("power", "power_floor", "broken_power", "chinchilla", "repeated")
SURFACES = ("chinchilla", "repeated")
"""forms of parameters and tokens"""
Status = Literal["converged", "not-converged"]
Array = NDArray[np.float64]
Values = float | Sequence[float] | Array
VARIABLES: dict[str, tuple[str, ...]] = {
    "power": ("x",), "power_floor": ("x",), "broken_power": ("x",), "chinchilla": ("x", "d"), "repeated": ("x", "d", "unique"),
}  # fmt: skip
UNITS = {"N": 1e9, "C": 1e15}
PARAMETERS: dict[str, int] = {"power": 2, "power_floor": 3, "broken_power": 5, "chinchilla": 5, "repeated": 6}
NAMES: dict[str, tuple[str, ...]] = {
    "power": ("E", "a", "alpha"), "power_floor": ("E", "a", "alpha"),
    "broken_power": ("E", "a", "alpha_1", "alpha_2", "x_break", "width"),
    "chinchilla": ("E", "A", "B", "alpha", "beta"), "repeated": ("E", "A", "B", "alpha", "beta", "r_star"),
}  # fmt: skip
"""parameters of each form, the columns of its draws"""
LEVEL = 0.95


def t_factor(level: float, freedom: float) -> float:
    """Half the width of Student's central interval of that level, in standard errors."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(freedom, 0.5 + level / 2))


def effective_data(d: float | Array, unique: float | Array, r_star: float | Array) -> Array:
    """D' of the form `repeated`: tokens that count, of d of which `unique` are different."""
    d, unique = np.asarray(d, dtype=float), np.asarray(unique, dtype=float)
    extra = np.maximum(d / unique - 1, 0)
    return np.asarray(np.where(d > unique, unique * (1 - r_star * np.expm1(-extra / r_star)), d))


def law_value(form: str, p: Mapping[str, Any], x: float | Array, d: float | Array = 1.0, unique: float | Array = 1.0) -> Array:
    """The law with parameters `p` (numbers, or columns that broadcast) at x; at (N, D) or (N, D, U) of the surfaces."""
    x, d = np.asarray(x, dtype=float), np.asarray(d, dtype=float)
    if form in SURFACES:
        data = effective_data(d, unique, p["r_star"]) if form == "repeated" else d
        return np.asarray(p["E"] + p["A"] * x ** -p["alpha"] + p["B"] * data ** -p["beta"])
    if form == "broken_power":
        u = np.log(x / p["x_break"])
        bend = p["width"] * (np.logaddexp(0, u / p["width"]) - math.log(2))
        return np.asarray(p["E"] + p["a"] * np.exp(-p["alpha_1"] * u - (p["alpha_2"] - p["alpha_1"]) * bend))
    return np.asarray(p["E"] + p["a"] * x ** -p["alpha"])


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
    """relative error of a value: root of the (weighted) sum of squares over the degrees of freedom, n - parameters; of broken_power that of
    L - E. Intervals do not go below `noise_floor`"""
    noise_floor: float = 0.0
    rows: tuple[str, ...] = ()
    excluded: tuple[tuple[str, str, str], ...] = ()
    """(run, code, sentence)"""
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    d: tuple[float, ...] = ()
    """tokens, of the surfaces"""
    unique: tuple[float, ...] = ()
    """different tokens among them, of the form repeated"""
    audit: dict[str, Any] = field(default_factory=dict)
    """gradient norm, active bounds, agreement of starts"""
    draws: tuple[tuple[float, ...], ...] = field(default=(), repr=False, compare=False)
    """bootstrap draws, rows of NAMES[form] and the noise of a run; none for the form power, whose intervals are exact"""

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
        if self.form in SURFACES:
            text = f"{self.metric} = {p['E']:.4f} + {p['A']:.4g} N^-{p['alpha']:.4f} + {p['B']:.4g} D{{}}^-{p['beta']:.4f}"
            if self.form == "chinchilla":
                return text.format("")
            return text.format("'") + f", D' = U + {p['r_star']:.3g} U (1 - exp(-(D/U - 1)/{p['r_star']:.3g}))"
        floor = f"{p['E']:.4f} + " if p["E"] > 0 else ""
        if self.form == "broken_power":
            at = f"({self.variable}/{p['x_break']:.3g})"
            return (f"{self.metric} = {floor}{p['a']:.4g} {at}^-{p['alpha_1']:.4f} below the break, ^-{p['alpha_2']:.4f} above it "
                    f"(width {p['width']:.2g})").replace("e+0", "e").replace("e+", "e")  # fmt: skip
        middle = math.exp(float(np.log(self.x).mean()))  # a small exponent puts the paper's beta beyond reading; this never is
        text = f"{p['a'] * middle ** -p['alpha']:.4g} ({self.variable}/{middle:.3g})^-{p['alpha']:.4f}"
        return f"{self.metric} = {floor}{text}".replace("e+0", "e").replace("e+", "e")

    @property
    def freedom(self) -> int:
        """Degrees of freedom left for the error estimate: points - parameters."""
        return len(self.x) - PARAMETERS[self.form]

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples, of ln y with normal errors: the smaller the better, between forms fitted to the same
        points; differences below 2 say nothing. NaN with too few points for it."""
        n, k = len(self.y), PARAMETERS[self.form] + 1
        if not self.converged or n - k - 1 <= 0:
            return math.nan
        misses = np.log(np.asarray(self.y) / law_value(self.form, self.params, *map(np.asarray, self.points)))
        return n * math.log(max(float((misses**2).mean()), 1e-24)) + 2 * k * n / (n - k - 1)

    @property
    def points(self) -> tuple[tuple[float, ...], ...]:
        """x, and d and unique where the form has them: what `predict` takes."""
        return tuple(values for values in (self.x, self.d, self.unique) if values)

    def local_exponents(self) -> list[float]:
        """-d ln (L - E) / d ln x between neighbouring points."""
        u, v = np.log(np.asarray(self.x)), np.log(np.asarray(self.y) - self.params.get("E", 0.0))
        order = np.argsort(u)
        return [float(a) for a in -np.diff(v[order]) / np.diff(u[order])]

    def weights(self, at: Array) -> Array:
        """Of the form power: ((y - E) / y)^2 of the law at `at`, how much its logs are worth; 1 where E is 0."""
        reducible = self.params["a"] * at ** -self.params["alpha"]
        return np.asarray((reducible / (self.params["E"] + reducible)) ** 2)

    def curvature(self) -> tuple[float, float]:
        """A bend of the power law: coefficient of (ln x)^2 beside the straight line in ln (L - E), and its two-sided p-value
        (Student's t, n - 3 degrees of freedom). NaN, NaN with fewer than four points."""
        from scipy.special import stdtr

        n = len(self.x)
        if self.form != "power" or n < 4 or not self.converged:
            return math.nan, math.nan
        u, root = np.log(np.asarray(self.x)), np.sqrt(self.weights(np.asarray(self.x)))
        basis = np.stack([np.ones(n), u, (u - u.mean()) ** 2], axis=1) * root[:, None]
        q, r = np.linalg.qr(basis)
        missed = np.asarray(self.residuals) * root
        weights = q.T @ missed
        left = missed - q @ weights
        sd = max(math.sqrt(float(left @ left) / (n - 3)), self.noise_floor)
        bend, error = weights[2] / r[2, 2], sd / abs(r[2, 2])
        return float(bend), float(2 * stdtr(n - 3, -abs(bend) / error))

    def predict(self, x: Values, d: Values | None = None, unique: Values | None = None) -> Array:
        """The fitted law at x (parameters or FLOPs); of the surfaces at N = x and D = d, of `repeated` with `unique` different tokens."""
        return law_value(self.form, self.params, *self._places(x, d, unique))

    def interval(
        self, x: Values, level: float = LEVEL, new_run: bool = True, *, d: Values | None = None, unique: Values | None = None
    ) -> tuple[Array, Array]:
        """Low and high at each x: of one new run (prediction), or of the law itself (`new_run=False`, confidence)."""
        places = [np.atleast_1d(values) for values in self._places(x, d, unique)]
        return self._t_interval(places[0], level, new_run) if self.form == "power" else self._draw_interval(places, level, new_run)

    def at(self, x: float, level: float = LEVEL, *, d: float | None = None, unique: float | None = None) -> Prediction:
        """Prediction of one new run at x."""
        low, high = self.interval(x, level, d=d, unique=unique)
        return Prediction(float(x), float(self.predict(x, d, unique)), float(low[0]), float(high[0]), level)

    def _t_interval(self, at: Array, level: float, new_run: bool) -> tuple[Array, Array]:
        """u +- t_{n-2} s sqrt([1/w(x)] + sum (1/n + (ln x - m) (ln x_i - m) / Sxx)^2 / w_i), u = ln (L - E), w the weights; with E = 0
        that is sqrt([1] + 1/n + (ln x - m)^2 / Sxx), exact for normal residuals."""
        points = np.asarray(self.x)
        log_x, p = np.log(points), self.params
        apart = log_x - log_x.mean()
        pull = 1 / len(points) + (np.log(at) - log_x.mean())[:, None] * apart[None, :] / (apart**2).sum()
        scale = np.sqrt(float(new_run) / self.weights(at) + (pull**2 / self.weights(points)[None, :]).sum(1))
        half = t_factor(level, len(points) - 2) * self.sd * scale
        middle = p["a"] * at ** -p["alpha"]
        with np.errstate(over="ignore"):
            return p["E"] + middle * np.exp(-half), p["E"] + middle * np.exp(half)

    def _draw_interval(self, places: list[Array], level: float, new_run: bool) -> tuple[Array, Array]:
        """Percentiles of the bootstrap laws; a new run adds a relative error of the drawn size."""
        if not self.draws:
            raise UserError(f"{self.metric}: this fit was made without draws, so it has no intervals")
        *columns, sd = (column[:, None] for column in np.asarray(self.draws).T)
        values = law_value(self.form, dict(zip(NAMES[self.form], columns, strict=True)), *(place[None, :] for place in places))
        if new_run:
            noise = np.random.default_rng(len(self.draws)).standard_normal(values.shape)
            floor = self.params["E"] if self.form == "broken_power" else 0.0  # its noise is of L - E
            values = floor + (values - floor) * np.exp(sd * noise)
        tail = 50 * (1 - level)
        low, high = np.percentile(values, [tail, 100 - tail], axis=0)
        return low, high

    def _places(self, *places: Values | None) -> list[Array]:
        """As many of x, d and unique as the form has, as arrays. UserError: no law, or too few or many variables."""
        if not self.converged:
            raise UserError(f"{self.metric}: the {self.form} fit did not converge ({self.reason}), so it predicts nothing")
        given = [np.asarray(values, dtype=float) for values in places if values is not None]
        if len(given) != len(VARIABLES[self.form]):
            raise UserError(f"the law {self.form} is of {', '.join(VARIABLES[self.form])}; give {len(VARIABLES[self.form])} values, not "
                            f"{len(given)}")  # fmt: skip
        return given

    def to_json(self) -> dict[str, Any]:
        """Plain values for fit.json; a number that is not finite becomes null."""
        names = ("form", "metric", "variable", "status", "reason", "params", "intervals", "objective", "r", "residuals", "residual_sd",
                 "noise_floor", "rows", "excluded", "x", "y", "d", "unique", "audit", "aicc")  # fmt: skip
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
