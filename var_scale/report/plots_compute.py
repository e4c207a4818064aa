"""Figures against compute and data: the frontiers, and isoFLOP curves."""

from __future__ import annotations

from typing import Any

import numpy as np

from var_scale.records.analyse import StudyResult
from var_scale.records.frontier import Frontier, evaluations
from var_scale.records.record import METRICS
from var_scale.report.theme import (
    FIT,
    INK,
    LABELS,
    SIZE_LABEL,
    figure,
    legend_of,
    log_axes,
    run_styles,
    shared_legend,
    size_colours,
)


def compute_figure(result: StudyResult) -> Any:
    """The four metrics of all healthy runs against training FLOPs, the Pareto frontier and, with
    runs of several lengths, its law, arranged like figure 6 of the VAR paper."""
    fig, axes = figure(2, 2, (9.2, 7.4))
    for axis, metric in zip(axes.flat, METRICS, strict=True):
        _curves(axis, result, result.frontiers[metric])
        axis.set_xlabel("training FLOPs (exact)")
    shared_legend(fig, axes, "alpha")
    return fig


def data_figure(result: StudyResult) -> Any:
    """The two losses of all healthy runs against tokens, the best at each number of tokens and,
    with runs of several lengths, its law."""
    fig, axes = figure(1, 2, (9.2, 4.4))
    for axis, metric in zip(axes.flat, ("loss_last", "loss_avg"), strict=True):
        _curves(axis, result, result.data_frontiers[metric])
        axis.set_xlabel("tokens seen, repeats counted")
    shared_legend(fig, axes, "alpha")
    return fig


def _curves(axis: Any, result: StudyResult, front: Frontier) -> None:
    """Evaluations of all runs along compute or tokens, one colour per size, and the frontier."""
    for run, style in run_styles(result.healthy):
        points = evaluations([run], front.metric, front.along)
        axis.plot([p.x for p in points], [p.value for p in points], ".-", ms=4, lw=1.1, **style)
    x, y = [p.x for p in front.points], [p.value for p in front.points]
    axis.plot(x, y, "o", mfc="none", mec=INK, ms=6, mew=0.8, label="Pareto frontier")
    if front.fit.converged and result.surface:  # without several lengths it has no meaning
        at = np.geomspace(min(front.fit.x), max(front.fit.x), 100)
        label = f"$\\alpha$ = {front.fit.params['alpha']:.4f}, $r$ = {front.fit.r:.3f}"
        axis.plot(at, front.fit.predict(at), color=FIT, lw=1.8, ls=(0, (5, 2)), label=label)
    log_axes(axis)
    axis.set_title(LABELS[front.metric])
    legend_of(axis, lambda label: "alpha" in label, loc="upper right")


def isoflop_figure(result: StudyResult) -> Any:
    """Loss against N at each compute budget, with the parabolas and their minima."""
    if result.isoflop is None:
        return None
    fig, axes = figure(1, 1, (6.4, 4.6))
    axis = axes.flat[0]
    colours = size_colours(list(range(len(result.isoflop.curves))))
    for number, curve in enumerate(result.isoflop.curves):
        colour, n, budget = colours[number], np.array(curve.sizes), f"{curve.flops:.2g} FLOP"
        axis.plot(n, curve.losses, "o", ms=5, color=colour, label=budget)
        used = n[[run in curve.entered for run in curve.runs]]
        at = np.geomspace(used.min(), used.max(), 100)
        u = np.log(at) - float(np.log(n).mean())
        parabola = np.polyval(curve.coefficients[::-1], u)
        axis.plot(at, parabola, "-", lw=1.3, color=colour, label=f"parabola at {budget}")
        if not curve.reason:
            minimum, label = ([curve.best_n], [curve.best_loss]), f"minimum at {budget}"
            axis.plot(*minimum, "o", ms=10, mfc="none", mec=INK, label=label)
    axis.set_xscale("log")
    axis.set_xlabel(SIZE_LABEL)
    axis.set_title(LABELS["loss_avg"])
    legend_of(axis, lambda label: " at " not in label, loc="best")
    return fig
