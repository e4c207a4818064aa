"""Sample quality over a study: the distance of every model's samples as a law of loss and size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from var_scale.laws.curve import fit_law
from var_scale.laws.law import LawFit

CLEAR = 0.9
"""Correlation of the logarithms below which a fit is noise and is not shown."""


@dataclass(frozen=True)
class Quality:
    """One run: its size, its average loss, and the distance of its samples."""

    run: str
    n: float
    loss: float
    distance: float
    flops: float = math.nan
    accuracy: float = math.nan
    """Share of the samples in which a classifier finds their class; NaN where none was trained."""
    share: float = 1.0
    """Of the training that was done before; the laws are of complete runs."""


def fit_quality(rows: Sequence[Quality], name: str) -> tuple[LawFit, LawFit]:
    """distance = a loss^alpha (a power law in 1 / loss), and distance = a N^-alpha, over complete
    runs.

    Either may not have converged; its code and reason tell why.
    """
    rows = [row for row in rows if row.share == 1]
    columns = {"1/loss": [1 / row.loss for row in rows], "N": [row.n for row in rows]}
    by_loss, by_n = (
        fit_law(
            "power",
            x,
            [row.distance for row in rows],
            metric=name,
            variable=variable,
            rows=[row.run for row in rows],
        )
        for variable, x in columns.items()
    )
    return by_loss, by_n


def follows(fit: LawFit) -> bool:
    """Whether the points lie along the fit."""
    return fit.converged and abs(fit.r) >= CLEAR
