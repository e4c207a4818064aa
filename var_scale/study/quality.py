"""Sample quality over a study: the distance of every model's samples against its loss and its size, with fits and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from var_scale.study.laws import LawFit
from var_scale.study.power import fit_law
from var_scale.study.theme import FIT, INK, decimal_log_axis, figure


@dataclass(frozen=True)
class Quality:
    """One run: its size, its average loss, and the distance of its samples."""

    run: str
    n: float
    loss: float
    distance: float


def fit_quality(rows: Sequence[Quality], name: str) -> tuple[LawFit, LawFit]:
    """distance = a loss^alpha (a power law in 1 / loss), and distance = a N^-alpha. Each may not converge, with its reason."""
    runs = [row.run for row in rows]
    distance = [row.distance for row in rows]
    by_loss = fit_law("power", [1 / row.loss for row in rows], distance, metric=name, variable="1/loss", rows=runs)
    return by_loss, fit_law("power", [row.n for row in rows], distance, metric=name, variable="N", rows=runs)


CLEAR = 0.9
"""correlation of the logarithms under which a fit is noise and is not shown"""


def follows(fit: LawFit) -> bool:
    """Whether the points lie along the fit."""
    return fit.converged and abs(fit.r) >= CLEAR


def quality_figure(rows: Sequence[Quality], fits: tuple[LawFit, LawFit], name: str) -> Any:
    """Distance against loss, and against N."""
    fig, axes = figure(1, 2, (9.2, 4.2))
    places = ([row.loss for row in rows], [row.n for row in rows])
    for axis, x, fit, label in zip(axes.flat, places, fits, ("average loss, nats", "parameters N = 18 d C²"), strict=True):
        if follows(fit):
            at = np.geomspace(min(x), max(x), 100)
            values = fit.predict(1 / at if fit.variable == "1/loss" else at)
            sign = "" if fit.variable == "1/loss" else "-"
            axis.plot(at, values, color=FIT, lw=1.6, label=f"exponent {sign}{fit.params['alpha']:.2f}, |r| = {abs(fit.r):.3f}")
        axis.plot(x, [row.distance for row in rows], "o", color=INK, ms=5, label="runs")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for which in ("x", "y"):
            decimal_log_axis(axis, which)
        axis.set_xlabel(label)
        axis.set_ylabel(name)
        axis.set_title("" if follows(fit) else f"no power law: r = {fit.r:.2f}" if fit.converged else "no power law fits")
        axis.legend(loc="best")
    return fig
