"""The picture of sample quality over a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from var_scale.laws.law import LawFit
from var_scale.records.quality import Quality, follows
from var_scale.report.theme import FIT, INK, SIZE_LABEL, decimal_log_axis, figure, log_axes

LABELS = ("average loss, nats", SIZE_LABEL)


def quality_figure(rows: Sequence[Quality], fits: tuple[LawFit, LawFit], name: str) -> Any:
    """Distance against loss and against N, with the fits of `fit_quality` that the points follow.

    Args:
        name: label of the distance.
    """
    fig, axes = figure(1, 2, (9.2, 4.2))
    places = ([row.loss for row in rows], [row.n for row in rows])
    for axis, x, fit, label in zip(axes.flat, places, fits, LABELS, strict=True):
        if follows(fit):
            at = np.geomspace(min(x), max(x), 100)
            by_loss = fit.variable == "1/loss"
            exponent = f"exponent {'' if by_loss else '-'}{fit.params['alpha']:.2f}"
            axis.plot(
                at,
                fit.predict(1 / at if by_loss else at),
                color=FIT,
                lw=1.6,
                label=f"{exponent}, |r| = {abs(fit.r):.3f}",
            )
        elif fit.converged:
            axis.set_title(f"no power law: r = {fit.r:.2f}")
        else:
            axis.set_title("no power law fits")
        axis.plot(x, [row.distance for row in rows], "o", color=INK, ms=5, label="runs")
        log_axes(axis)
        decimal_log_axis(axis, "x")
        axis.set_xlabel(label)
        axis.set_ylabel(name)
        axis.legend(loc="best")
    return fig
