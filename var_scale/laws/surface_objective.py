"""The objective of the laws of parameters and data, with its gradient: by default a Huber loss in
logs."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from var_scale.laws.forms import Array, Form, effective_data

DELTA = 1e-3
"""Huber's threshold on ln L, as in Hoffmann et al. 2022: a few bad runs do not move the law."""
BOUNDS = {
    "A": (-20.0, 20.0),
    "B": (-20.0, 20.0),
    "E": (-15.0, 15.0),
    "alpha": (0.0, 3.0),
    "beta": (0.0, 3.0),
    "r_star": (math.log(0.05), math.log(1e4)),
}
"""Search bounds of theta, in its order: logs of A, B, E and r_star, the exponents themselves."""


ObjectiveName = Literal["huber_log", "huber", "mse"]
OBJECTIVES: tuple[ObjectiveName, ...] = ("huber_log", "huber", "mse")
"""Huber's loss of ln y, Huber's loss of y, and the squares of y."""


class Objective(NamedTuple):
    """What a fit of a surface minimises."""

    name: ObjectiveName = "huber_log"
    delta: float = DELTA
    """Huber's threshold, on ln y or in the unit of y; without meaning for mse."""


def huber_objective(theta: Array, u: Array, w: Array, v: Array) -> tuple[float, Array]:
    """Sum of Huber(DELTA) / DELTA^2 of ln L - ln fitted, and its gradient (5,).

    Args:
        theta: (ln A, ln B, ln E, alpha, beta).
        u: ln N, (n,).
        w: ln D, (n,).
        v: ln L, (n,).
    """
    value, gradient, _ = _parts(theta, u, w, v, np.ones_like(v), Objective())
    return value, gradient


def _parts(
    theta: Array, u: Array, w: Array, v: Array, weights: Array, objective: Objective
) -> tuple[float, Array, Array]:
    """The objective, its gradient, and its derivative by each ln D."""
    a, b, e, alpha, beta = map(float, theta)
    sized, fed = a - alpha * u, b - beta * w
    fitted = np.logaddexp(np.logaddexp(sized, fed), e)
    logs = objective.name == "huber_log"
    excess = fitted - v if logs else np.exp(fitted) - np.exp(v)
    delta = math.inf if objective.name == "mse" else objective.delta
    slope = np.minimum(np.maximum(excess, -delta), delta)
    value = (weights * slope) @ (excess - 0.5 * slope)  # the square within delta, the line beyond
    slope = weights * slope * (1 if logs else np.exp(fitted))  # by ln fitted
    wa, wb = slope * np.exp(sized - fitted), slope * np.exp(fed - fitted)
    by_a, by_b = wa.sum(), wb.sum()
    gradient = np.array([by_a, by_b, slope.sum() - by_a - by_b, -wa @ u, -wb @ w])
    unit = unit_of(objective, v)
    return float(value) / unit**2, gradient / unit**2, -beta * wb / unit**2


def unit_of(objective: Objective, v: Array) -> float:
    """The miss whose square is the unit of the objective; tolerances of a search refer to it."""
    level = 1.0 if objective.name == "huber_log" else float(np.exp(np.median(v)))
    return DELTA * level if objective.name == "mse" else min(objective.delta, DELTA * level)


def log_data(d: Array, unique: Array, r_star: float | Array) -> tuple[Array, Array]:
    """ln D' of each row of the form `repeated`, and its derivative by ln r_star: both (n,), or
    (tables, n) for r_star of shape (tables, 1)."""
    data = effective_data(d, unique, r_star)
    share = np.maximum(d / unique - 1, 0) / r_star
    return np.log(data), unique * r_star * (1 - np.exp(-share) * (1 + share)) / data


class Problem(NamedTuple):
    """Runs of a surface, every array (n,). Logs are centred, which removes most of the correlation
    between a coefficient and its exponent."""

    form: Form
    n: Array
    d: Array
    unique: Array
    """Infinite unless the form is repeated."""
    u: Array
    """ln N minus its mean `mu`."""
    w: Array
    """ln D minus its mean `mw`."""
    v: Array
    """ln L."""
    mu: float
    mw: float
    weights: Array
    minimise: Objective

    @staticmethod
    def of(
        form: Form,
        n: Array,
        d: Array,
        loss: Array,
        unique: Array,
        weights: Array,
        minimise: Objective,
    ) -> Problem:
        """The problem of these runs; all values are positive."""
        u, w = np.log(n), np.log(d)
        mu, mw = float(u.mean()), float(w.mean())
        logs = (u - mu, w - mw, np.log(loss))
        return Problem(form, n, d, unique, *logs, mu, mw, weights, minimise)

    def objective(self, theta: Array) -> tuple[float, Array]:
        """Value and gradient at theta = (ln A, ln B, ln E, alpha, beta[, ln r_star]), without beta
        for the form tied."""
        data = (self.u, self.w, self.v, self.weights, self.minimise)
        if self.form == "tied":
            value, gradient, _ = _parts(np.append(theta, theta[3]), *data)
            return value, np.append(gradient[:3], gradient[3] + gradient[4])
        if self.form == "chinchilla":
            return _parts(theta, *data)[:2]
        logs, slope = log_data(self.d, self.unique, math.exp(theta[5]))
        data = (data[0], logs - self.mw, *data[2:])
        value, gradient, by_data = _parts(theta[:5], *data)
        return value, np.append(gradient, by_data @ slope)

    def descend(self, start: Array) -> tuple[float, Array]:
        """L-BFGS-B from one start: the objective and theta at the end.

        Restarted until it stops gaining: the Huber loss has kinks in its second derivative, at
        which the memory of L-BFGS misleads it and ends the descent early.
        """
        from scipy.optimize import minimize

        bounds = list(BOUNDS.values())[: len(start)]
        theta, value = np.clip(start, *np.array(bounds).T), math.inf
        for _ in range(5):
            found = minimize(
                self.objective,
                theta,
                method="L-BFGS-B",
                jac=True,
                bounds=bounds,
                options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9, "maxls": 60},
            )
            gain, value, theta = value - found.fun, float(found.fun), found.x
            if gain < 1e-9 * (1 + value):
                break
        return value, theta

    def natural(self, theta: Array) -> dict[str, float]:
        """Parameters of the law by name, in the order of NAMES, from theta with centred logs.

        E is 0 at the lower bound of its search.
        """
        a, b, e, alpha = map(float, theta[:4])
        beta = alpha if self.form == "tied" else float(theta[4])
        params = {
            "E": math.exp(e) if e > BOUNDS["E"][0] + 1e-6 else 0.0,
            "A": math.exp(a + alpha * self.mu),
            "B": math.exp(b + beta * self.mw),
            "alpha": alpha,
        }
        if self.form == "tied":
            return params
        params["beta"] = beta
        return params | ({"r_star": math.exp(theta[5])} if self.form == "repeated" else {})
