"""Figures against model size: the laws, their residuals, floor and exponent, each scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from var_scale.records.analyse import StudyResult
from var_scale.records.record import METRICS
from var_scale.report.theme import (
    BAND,
    DARK,
    FIT,
    HELD,
    INK,
    LABELS,
    SIZE_LABEL,
    decimal_log_axis,
    figure,
    legend_of,
    log_axes,
    run_styles,
    shared_legend,
)


def laws_figure(result: StudyResult) -> Any:
    """The four metrics against N: points, law, its 95 % band, and the hold-out prediction."""
    fig, axes = figure(2, 2, (9.2, 7.4))
    for axis, metric in zip(axes.flat, METRICS, strict=True):
        _law_panel(axis, result, metric)
        axis.set_xlabel(SIZE_LABEL)
    shared_legend(fig, axes, "alpha")
    return fig


def _law_panel(axis: Any, result: StudyResult, metric: str) -> None:
    """One metric above its assumed floor, so that a power law is a straight line."""
    fit, floor = result.law(metric), result.floors[metric]
    held = result.holdouts[metric, fit.form]
    runs = result.gate.kept
    n = np.array([run.n for run in runs], dtype=float)
    y = np.array([run.metric(metric) for run in runs]) - floor
    is_held = np.array([run.name in held.held for run in runs])
    if fit.converged:
        at = np.geomspace(n.min() / 1.25, n.max() * 1.25, 200)
        low, high = fit.interval(at, new_run=False)
        # The band of a law through few points can be so wide that it would flatten the data.
        if np.nanmax(high - floor) <= 3 * y.max():
            label = "95 % band of the law"
            axis.fill_between(at, low - floor, high - floor, color=BAND, lw=0, label=label)
        ends = fit.intervals["alpha"]
        more = f"$r$ = {fit.r:.4f}"
        if fit.form == "power_floor":
            more = f"$E$ = {fit.params['E']:.4g}, fitted"
        label = f"$\\alpha$ = {fit.params['alpha']:.4f}  [{ends[0]:.4f}, {ends[1]:.4f}]\n{more}"
        axis.plot(at, fit.predict(at) - floor, color=FIT, lw=1.6, label=label)
    if held.prediction and held.fit:
        p, label = held.prediction, "law without the largest size"
        at = np.geomspace(min(held.fit.x), p.x, 50)
        style: dict[str, Any] = {"color": HELD, "lw": 1.4}
        axis.plot(at, held.fit.predict(at) - floor, ls=(0, (4, 3)), zorder=4, label=label, **style)
        bars, label = [[p.value - p.low], [p.high - p.value]], "its prediction, 95 % interval"
        style |= {"capsize": 4, "fmt": "x", "ms": 9, "zorder": 7}
        axis.errorbar([p.x], [p.value - floor], yerr=bars, label=label, **style)
    axis.plot(n[~is_held], y[~is_held], "o", color=INK, ms=5, zorder=5, label="measured")
    style = {"color": "white", "mec": HELD, "mew": 1.6, "ms": 6.5, "zorder": 6}
    axis.plot(n[is_held], y[is_held], "D", label="held out, measured", **style)
    log_axes(axis)
    zero = "" if fit.form == "power_floor" else "  (E = 0)"
    axis.set_title(LABELS[metric] + (f"  (minus E = {floor:g})" if floor else zero))
    if fit.converged:
        legend_of(axis, lambda label: "alpha" in label, loc="upper right")
    else:
        # Metrics fall with size, which leaves this corner free.
        place = {"transform": axis.transAxes, "ha": "left", "va": "bottom"}
        axis.text(0.03, 0.03, f"no law: {fit.reason}", fontsize=7, wrap=True, **place)


def ridge_figure(result: StudyResult) -> Any:
    """The regions of irreducible part E and exponent alpha that the points of the losses allow, and
    the ridge along which the two trade."""
    metrics = ("loss_last", "loss_avg")
    if not any(result.fits[metric, "power_floor"].converged for metric in metrics):
        return None
    fig, axes = figure(1, 2, (9.2, 4.2))
    for axis, metric in zip(axes.flat, metrics, strict=True):
        if result.fits[metric, "power_floor"].converged:
            _ridge_panel(axis, result, metric)
        else:
            axis.set_axis_off()
            axis.set_title(f"{LABELS[metric]}: E is not fitted", fontsize=9)
    return fig


def _ridge_panel(axis: Any, result: StudyResult, metric: str) -> None:
    """One metric: its 50 % and 95 % regions, the ridge, and the fits with E free and assumed."""
    fit, assumed = result.fits[metric, "power_floor"], result.fits[metric, "power"]
    region = result.ridge(metric)
    for (low, high), colour, name in (
        (region.most, BAND, "95 % region"),
        (region.half, DARK, "50 % region"),
    ):
        axis.fill_between(region.floors, low, high, color=colour, lw=0.8, label=name)
    inside = np.isfinite(region.most[0])
    dashes: dict[str, Any] = {"color": INK, "lw": 0.8, "ls": (0, (2, 2))}
    label = "best exponent at each E"
    axis.plot(region.floors[inside], region.best[inside], label=label, **dashes)
    best = ([fit.params["E"]], [fit.params["alpha"]])
    axis.plot(*best, "x", color=HELD, ms=9, mew=1.8, label="best fit, E free")
    if assumed.converged:
        label = f"E = {assumed.params['E']:g} assumed"
        point = ([assumed.params["E"]], [assumed.params["alpha"]])
        axis.plot(*point, "o", mfc="none", mec=INK, ms=8, label=label)
    axis.set_yscale("log")
    decimal_log_axis(axis, "y")
    axis.set_xlabel("irreducible part E, nats")
    axis.set_ylabel("exponent α")
    axis.set_title(LABELS[metric])
    axis.legend(loc="upper left")


def residuals_figure(result: StudyResult) -> Any:
    """Measured over fitted values in percent against N: structure means that the form is wrong."""
    if not any(result.fits[metric, "power"].converged for metric in METRICS):
        return None
    fig, axes = figure(2, 2, (9.2, 6.2))
    for axis, metric in zip(axes.flat, METRICS, strict=True):
        axis.axhline(0, color="0.6", lw=0.8)
        for form, marker, colour in (("power", "o", FIT), ("power_floor", "s", HELD)):
            fit = result.fits[metric, form]
            # With a fitted floor of 0 the second form is the first one again.
            if not fit.converged or (form == "power_floor" and fit.params["E"] == 0):
                continue
            name = "power law" if form == "power" else f"with floor E = {fit.params['E']:.3g}"
            residuals = 100 * (np.array(fit.y) / fit.predict(fit.x) - 1)
            face = colour if form == "power" else "none"
            axis.plot(fit.x, residuals, marker, color=colour, ms=5, mfc=face, label=name)
        axis.set_xscale("log")
        axis.margins(y=0.25)
        axis.set_xlabel(SIZE_LABEL)
        axis.set_ylabel("measured / fitted − 1, %")
        axis.set_title(LABELS[metric])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best")
    return fig


def per_scale_figure(result: StudyResult) -> Any:
    """Loss and error rate of each scale of the token pyramid, one line per run."""
    runs = [run for run in result.gate.kept if run.loss_per_scale and run.err_per_scale]
    if not runs:
        return None
    fig, axes = figure(1, 2, (9.2, 4.0))
    panels = (("loss", "cross-entropy, nats per token", 1), ("err", "top-1 error, %", 100))
    for axis, (name, title, factor) in zip(axes.flat, panels, strict=True):
        for run, style in run_styles(runs):
            values = factor * np.array(getattr(run, f"{name}_per_scale"))
            axis.plot(range(1, len(values) + 1), values, "-o", ms=3.5, lw=1.2, **style)
        axis.set_xlabel("scale (1 is one token)")
        axis.set_title(title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="best", ncols=2)
    return fig
