"""The picture and the section of the report about sample quality over a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_scale.laws.law import LawFit
from var_scale.progress import short
from var_scale.records.quality import Quality, follows
from var_scale.report.report import table
from var_scale.report.theme import (
    FIT,
    INK,
    SIZE_LABEL,
    decimal_log_axis,
    figure,
    log_axes,
    size_colours,
)
from var_scale.report.values import number, percent

LABELS = ("average loss, nats", SIZE_LABEL)


def quality_figure(rows: Sequence[Quality], fits: tuple[LawFit, LawFit], name: str) -> Any:
    """Distance against loss and against N, with the fits of `fit_quality` that the points follow;
    where a classifier was trained, also the share of samples that show their class, against
    compute.

    Args:
        name: label of the distance.
    """
    judged = any(math.isfinite(row.accuracy) for row in rows)
    fig, axes = figure(1, 2 + judged, (13.4 if judged else 9.2, 4.2))
    if judged:
        _accuracy(axes.flat[2], rows)
    rows = [row for row in rows if row.share == 1]
    places = ([row.loss for row in rows], [row.n for row in rows])
    for axis, x, fit, label in zip(axes.flat, places, fits, LABELS, strict=False):
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


def _accuracy(axis: Any, rows: Sequence[Quality]) -> None:
    """One line per size over its training."""
    for n, colour in size_colours(sorted({int(row.n) for row in rows})).items():
        line = sorted((row.flops, 100 * row.accuracy) for row in rows if row.n == n)
        axis.plot(*zip(*line, strict=True), "o-", color=colour, ms=5, label=f"N = {short(n)}")
    log_axes(axis)
    axis.set_yscale("linear")
    axis.set_ylim(0, 100)
    axis.set_xlabel("training FLOP")
    axis.set_ylabel("samples that show their class, %")
    axis.legend(loc="upper left")


def quality_section(found: Mapping[str, Any], picture: str) -> str:
    """The section about samples, as Markdown, from the content of quality.json.

    Args:
        picture: name of the picture beside the report.
    """
    rows, settings = found["runs"], found["settings"]
    distances = [key for key in rows[0] if key.startswith(("FD-", "FID"))]
    judged = found.get("classifier")
    head = [
        "run",
        "share of the training",
        "FLOP",
        "average loss",
        *distances,
        *(["samples that show their class"] * bool(judged)),
    ]
    cells = [
        [
            row["run"],
            percent(row["share"], 0),
            f"{row['flops']:.2g}",
            number(row["loss_avg"]) if "loss_avg" in row else "",
            *(number(row[key]) for key in distances),
            *([percent(row["accuracy"], 1)] if judged else []),
        ]
        for row in rows
    ]
    text = (
        f"{found['count']:,} samples of each size with guidance {settings['cfg']:g}"
        f"{_cuts(settings)}, compared with the validation images."
    )
    if judged:
        text += (
            " A small classifier, trained on real training images, finds the class of "
            f"{percent(judged['validation'], 1)} of the real validation images. The last column is "
            "the share of samples in which it finds the class that was asked for."
        )
    return "\n\n".join(
        ["## Quality of the samples", text, table(head, cells), f"![Sample quality]({picture})"]
    )


def _cuts(settings: Mapping[str, Any]) -> str:
    """Top-k and top-p in words."""
    cuts = [f"{name} {settings[key]:g}" for name, key in (("top-k", "top_k"), ("top-p", "top_p"))]
    on = [text for text, key in zip(cuts, ("top_k", "top_p"), strict=True) if settings[key]]
    return f" and {' and '.join(on)}" if on else ""
