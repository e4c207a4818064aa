"""The frozen result of a fit: parameters, intervals, audit, predictions, or why there is no law."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.forms import (
    LEVEL,
    NAMES,
    PARAMETERS,
    SURFACES,
    VARIABLES,
    Array,
    Form,
    law_value,
    t_factor,
)
from var_scale.laws.repeats import NONE, NOT_KNOWN, Noise, Repeats, noise_of

Status = Literal["converged", "not-converged"]
Values = float | Sequence[float] | Array
Interval = tuple[float, float]
Excluded = tuple[tuple[str, str, str], ...]
"""Rows that were left out: (name, code, sentence)."""
NOISE_FLOOR = 5e-4
"""Smallest relative noise per run that intervals of measured runs assume. Three seeds of DeepMind's
130M model differ by 0.0007 nats at 2.66, which is 3e-4."""
FAILURES = {
    "lengths_differ": "the columns have different lengths",
    "not_positive": "a size, token count or value is not a positive finite number",
    "too_few": "fewer points, sizes or token counts than the form needs",
    "floor_above_values": "the assumed floor is not below the smallest value",
    "no_decay": "the value does not fall with size, or not rise where it should",
    "floor_not_identified": "a search bound stopped the floor or the exponent of power_floor",
    "gradient": "the gradient at the end is not close to zero",
    "search_unfinished": "the search for the break did not end",
    "no_break": "the best break lies at the edge of the sizes",
    "break_too_wide": "the transition between both exponents is too wide for the sizes",
    "sizes_follow_tokens": "tokens are a power of the size, so their parts cannot be separated",
    "no_repetition": "fewer than two token counts repeat their data",
    "repetition_free": "the rows show no loss through repetition",
    "at_bound": "a search bound stopped a parameter of a surface",
    "not_determined": "other parameters fit the rows as well",
    "starts_disagree": "only one descent reached the best objective",
}
"""Codes of fits that did not converge, and their meanings."""


@dataclass(frozen=True)
class Prediction:
    """A law at one x with its interval for one new run, in the unit of the metric."""

    x: float
    value: float
    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class LawFit:
    """One fitted law. Check `converged` first: otherwise it has a reason and no predictions."""

    form: Form
    metric: str
    variable: str
    """N (parameters), C (training FLOPs), N,D, or the name of another column."""
    status: Status = "not-converged"
    reason: str = ""
    """Why the fit did not converge, for people."""
    code: str = ""
    """The same for programs: one of FAILURES, empty for a converged fit."""
    params: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    """95 % confidence intervals of `params`; infinite or zero where the data do not bound them."""
    objective: float = math.nan
    r: float = math.nan
    """Pearson correlation of ln x and ln (L - E). Descriptive: it hardly depends on whether the
    law is right."""
    residuals: tuple[float, ...] = ()
    """ln measured - ln fitted in row order; of L - E for power and broken_power, otherwise of L."""
    residual_sd: float = math.nan
    """Relative error of a value: root of the (weighted) sum of squares over the degrees of freedom;
    of L - E for broken_power."""
    noise: Noise = NOT_KNOWN
    """Relative noise that intervals use: that of the residuals, with what repeats of the sizes tell
    (`repeats.noise_of`). For laws of one variable."""
    noise_floor: float = 0.0
    """Smallest noise that intervals and tests assume."""
    repeats: Repeats = NONE
    """Of the points, which are means over them."""
    rows: tuple[str, ...] = ()
    excluded: Excluded = ()
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    d: tuple[float, ...] = ()
    """Tokens, for a surface."""
    unique: tuple[float, ...] = ()
    """Different tokens among them, for the form repeated."""
    row_weights: tuple[float, ...] = ()
    """Given weights of the rows with mean 1: the variance of a row's noise is inverse to its
    weight. Empty where all are 1."""
    audit: dict[str, Any] = field(default_factory=dict)
    """Method, gradient norm, active bounds, agreement of starts."""
    draw: Callable[[], Array] | None = field(default=None, repr=False, compare=False)
    """Makes `draws`, which only predictions need."""

    @cached_property
    def draws(self) -> Array:
        """Bootstrap draws: rows of NAMES[form] and the noise per run. The form power has none
        because its intervals are exact."""
        return np.zeros((0, 0)) if self.draw is None else self.draw()

    def failed(self, code: str, reason: str, **values: Any) -> LawFit:
        """This result as a fit that did not converge; `values` are fields known nevertheless."""
        assert code in FAILURES, code
        return replace(self, status="not-converged", code=code, reason=reason, **values)

    def solved(self, **values: Any) -> LawFit:
        """This result as a converged fit with these fields."""
        return replace(self, status="converged", **values)

    def noise_of(self, residual_sd: float, freedom: int) -> Noise:
        """The noise that residuals of these points show, with their repeats."""
        return noise_of(residual_sd, freedom, self.repeats, self.noise_floor)

    @property
    def converged(self) -> bool:
        """Whether there is a law to use."""
        return self.status == "converged"

    @property
    def equation(self) -> str:
        """The law as one line of text."""
        if not self.converged:
            return f"not converged: {self.reason}"
        p = self.params
        if self.form in SURFACES:
            floor = f"{p['E']:.4f} + " if p["E"] > 0 else ""
            size = f"{floor}{p['A']:.4g} N^-{p['alpha']:.4f}"
            mark = "'" if self.form == "repeated" else ""
            text = f"{self.metric} = {size} + {p['B']:.4g} D{mark}^-{p.get('beta', p['alpha']):.4f}"
            if self.form != "repeated":
                return text
            r = f"{p['r_star']:.3g}"
            return f"{text}, D' = U + {r} U (1 - exp(-(D/U - 1)/{r}))"
        floor = f"{p['E']:.4f} + " if p["E"] > 0 else ""
        if self.form == "broken_power":
            at = f"({self.variable}/{p['x_break']:.3g})"
            text = (
                f"{p['a']:.4g} {at}^-{p['alpha_1']:.4f} below the break, ^-{p['alpha_2']:.4f} "
                f"above it (width {p['width']:.2g})"
            )
        else:
            # A small exponent puts the paper's beta beyond the range that people can read; the
            # value at the middle of the sizes is always readable.
            middle = math.exp(float(np.log(self.x).mean()))
            level = p["a"] * middle ** -p["alpha"]
            text = f"{level:.4g} ({self.variable}/{middle:.3g})^{-p['alpha']:.4f}"
        return f"{self.metric} = {floor}{text}".replace("e+0", "e").replace("e+", "e")

    @property
    def freedom(self) -> int:
        """Degrees of freedom left for the error estimate: points - parameters."""
        return len(self.x) - PARAMETERS[self.form]

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples, of ln y with normal errors.

        Smaller is better between forms fitted to the same points; differences below 2 mean
        nothing. NaN with fewer points than parameters + 4: with one point less the penalty of
        power_floor exceeds that of power by 30, whatever the points are.
        """
        n, k = len(self.y), PARAMETERS[self.form] + 1  # one more for the noise
        if not self.converged or n - k - 1 < 2:
            return math.nan
        fitted = law_value(self.form, self.params, *map(np.asarray, self.points))
        misses = np.log(np.asarray(self.y) / fitted)
        # Points exactly on the law would give minus infinity.
        return n * math.log(max(float((misses**2).mean()), 1e-24)) + 2 * k * n / (n - k - 1)

    @property
    def points(self) -> tuple[tuple[float, ...], ...]:
        """x, and d and unique where the form has them: the arguments of `predict`."""
        return tuple(values for values in (self.x, self.d, self.unique) if values)

    def local_exponents(self) -> list[float]:
        """-d ln (L - E) / d ln x between neighbouring points."""
        u, v = np.log(np.asarray(self.x)), np.log(np.asarray(self.y) - self.params.get("E", 0.0))
        order = np.argsort(u)
        return [float(a) for a in -np.diff(v[order]) / np.diff(u[order])]

    def weights(self, at: Array) -> Array:
        """Weights of ln (y - E) at the sizes `at`, for the form power: ((y - E) / y)^2.

        The noise is a share of y, so a small reducible part makes its logarithm noisy. 1 where
        E is 0.
        """
        reducible = self.params["a"] * at ** -self.params["alpha"]
        return np.asarray((reducible / (self.params["E"] + reducible)) ** 2)

    def given_weights(self) -> Array:
        """Weights of the rows, (n,), all 1 unless given."""
        return np.asarray(self.row_weights) if self.row_weights else np.ones(len(self.x))

    def precisions(self) -> Array:
        """Inverse variances of ln (y - E) of the rows in units of that of ln y, for the form power:
        (n,)."""
        return self.weights(np.asarray(self.x)) * self.given_weights()

    def curvature(self) -> tuple[float, float]:
        """Test the power law for a bend.

        Returns:
            The coefficient of (ln x)^2 beside the straight line in ln (L - E), and its two-sided
            p-value (Student's t with n - 3 degrees of freedom, and those of repeats). NaN, NaN for
            other forms and with fewer than four points.
        """
        from scipy.special import stdtr

        n = len(self.x)
        if self.form != "power" or n < 4 or not self.converged:
            return math.nan, math.nan
        u, root = np.log(np.asarray(self.x)), np.sqrt(self.precisions())
        basis = np.stack([np.ones(n), u, (u - u.mean()) ** 2], axis=1) * root[:, None]
        # The residuals of the line are fitted instead of the values: the quadratic coefficient is
        # the same, and few digits are lost when the line explains nearly everything.
        q, r = np.linalg.qr(basis)
        missed = np.asarray(self.residuals) * root
        weights = q.T @ missed
        left = missed - q @ weights
        sd = math.sqrt(float(left @ left) / (n - 3))
        noise = self.noise_of(sd, n - 3).point
        bend, error = weights[2] / r[2, 2], noise.sd / abs(r[2, 2])
        return float(bend), float(2 * stdtr(noise.freedom, -abs(bend) / error))

    def predict(self, x: Values, d: Values | None = None, unique: Values | None = None) -> Array:
        """The fitted law at x (parameters or FLOPs), for a surface at N = x, D = d, U = unique.

        Raises:
            UserError: code `laws.not-converged` or `laws.variables`.
        """
        return law_value(self.form, self.params, *self._places(x, d, unique))

    def interval(
        self,
        x: Values,
        level: float = LEVEL,
        new_run: bool = True,
        *,
        d: Values | None = None,
        unique: Values | None = None,
    ) -> tuple[Array, Array]:
        """Low and high ends at each x, in the unit of the metric.

        Args:
            new_run: the interval of one new run (prediction), otherwise of the law (confidence).

        Raises:
            UserError: code `laws.not-converged`, `laws.variables` or `laws.no-draws`.
        """
        places = [np.atleast_1d(values) for values in self._places(x, d, unique)]
        if self.form == "power":
            return self._t_interval(places[0], level, new_run)
        return self._draw_interval(places, level, new_run)

    def at(
        self, x: float, level: float = LEVEL, *, d: float | None = None, unique: float | None = None
    ) -> Prediction:
        """Prediction of one new run at x; raises as `interval` does."""
        low, high = self.interval(x, level, d=d, unique=unique)
        value = float(self.predict(x, d, unique))
        return Prediction(float(x), value, float(low[0]), float(high[0]), level)

    def _t_interval(self, at: Array, level: float, new_run: bool) -> tuple[Array, Array]:
        """u +- t sqrt([r^2/w(x)] + s^2 sum g_i^2 (1/G + (ln x - m) (ln x_i - m) / Sxx)^2 / w_i).

        u = ln (L - E), s and r the noise of a point and of a new run, w the precisions, g given
        weights with the sum G and weighted mean m and Sxx of ln x, [] only for a new run. With
        E = 0, equal g and no repeats it is s^2 ([1] + 1/n + (ln x - m)^2 / Sxx), exact for normal
        residuals.
        """
        log_x, p, given = np.log(np.asarray(self.x)), self.params, self.given_weights()
        middle = float(given @ log_x / given.sum())
        apart = log_x - middle
        tilt = (np.log(at) - middle)[:, None] * apart[None, :] / float(given @ apart**2)
        pull = given * (1 / given.sum() + tilt)
        law_part = (pull**2 / self.precisions()[None, :]).sum(1)
        own = self.noise.run.sd**2 / self.weights(at) if new_run else 0.0
        freedom = (self.noise.run if new_run else self.noise.point).freedom
        half = t_factor(level, freedom) * np.sqrt(own + self.noise.point.sd**2 * law_part)
        reducible = p["a"] * at ** -p["alpha"]
        with np.errstate(over="ignore"):  # an interval without a bound is infinite
            return p["E"] + reducible * np.exp(-half), p["E"] + reducible * np.exp(half)

    def _draw_interval(
        self, places: list[Array], level: float, new_run: bool
    ) -> tuple[Array, Array]:
        """Percentiles over the bootstrap laws; a new run adds a relative error of the drawn sd."""
        if not len(self.draws):
            raise UserError(
                f"{self.metric}: this fit has no bootstrap draws, so it has no intervals",
                code="laws.no-draws",
            )
        *columns, sd = (column[:, None] for column in self.draws.T)
        params = dict(zip(NAMES[self.form], columns, strict=True))
        values = law_value(self.form, params, *(place[None, :] for place in places))
        if new_run:
            noise = np.random.default_rng(len(self.draws)).standard_normal(values.shape)
            # The noise of broken_power is a share of L - E, that of the other forms a share of L.
            floor = self.params["E"] if self.form == "broken_power" else 0.0
            values = floor + (values - floor) * np.exp(sd * noise)
        tail = 50 * (1 - level)
        low, high = np.percentile(values, [tail, 100 - tail], axis=0)
        return low, high

    def _places(self, *places: Values | None) -> list[Array]:
        """x, d and unique as arrays, as many as the form has."""
        if not self.converged:
            raise UserError(
                f"{self.metric}: the {self.form} fit did not converge ({self.reason}), so it "
                "predicts nothing",
                code="laws.not-converged",
            )
        given = [np.asarray(values, dtype=float) for values in places if values is not None]
        need = VARIABLES[self.form]
        if len(given) != len(need):
            raise UserError(
                f"the form {self.form} has the variables {', '.join(need)}; give {len(need)} "
                f"values, not {len(given)}",
                code="laws.variables",
            )
        return given

    def to_json(self) -> dict[str, Any]:
        """Plain values for fit.json; a number that is not finite becomes null."""
        left = ("draw", "noise", "repeats")
        names = [item.name for item in fields(self) if item.name not in left]
        value = {name: plain(getattr(self, name)) for name in (*names, "aicc")}
        return value | {"noise": plain({k: v._asdict() for k, v in self.noise._asdict().items()})}


def plain(value: Any) -> Any:
    """Copy for JSON: tuples become lists, NaN and infinities null, numpy scalars Python numbers."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
