"""The pictures of a study, each as PNG, SVG and PDF with its data as CSV. matplotlib without a display."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.files import write_text
from var_scale.study.analyse import StudyResult
from var_scale.study.frontier import Frontier, evaluations
from var_scale.study.laws import LawFit
from var_scale.study.power import ridge_regions
from var_scale.study.record import METRICS
from var_scale.study.theme import BAND, DARK, FIT, GRID_METRICS, HELD, INK, LABELS, decimal_log_axis, figure, look, save, size_colours

SIZE_LABEL = {"params_paper": "parameters N = 18 d C²", "params_total": "parameters N (all)", "params_per_token": "parameters N = 12 d C²"}


def write_plots(result: StudyResult, folder: Path) -> dict[str, Path]:
    """Write NAME.png, .svg, .pdf and .csv into `folder`; returns the PNG of each picture that has something to show."""
    if not result.gate.kept:
        return {}
    makers = {"laws": laws_figure, "ridge": ridge_figure, "compute": compute_figure, "data": data_figure, "isoflop": isoflop_figure,
              "residuals": residuals_figure, "per_scale": per_scale_figure}  # fmt: skip
    written: dict[str, Path] = {}
    with look():
        for name, maker in makers.items():
            if (drawn := maker(result)) is not None:
                written[name] = save(drawn, Path(folder), name)
                write_text(Path(folder) / f"{name}.csv", figure_data(drawn))
    return written


def figure_data(drawn: Any) -> str:
    """What a figure shows, as CSV: panel, series, x, y of every line and set of points."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["panel", "series", "x", "y"])
    for axis in drawn.axes:
        for number, line in enumerate(axis.lines):
            label = str(line.get_label()).replace("\n", "; ")
            name = f"line {number}" if label.startswith("_") else label
            for x, y in zip(np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist(), strict=True):
                writer.writerow([axis.get_title(), name, f"{x:.8g}", f"{y:.8g}"])
    return out.getvalue()


def laws_figure(result: StudyResult) -> Any:
    """L_last and L_avg over Err_last and Err_avg against N: points, law, 95 % band, hold-out prediction."""
    fig, axes = figure(2, 2, (9.2, 7.4))
    for axis, metric in zip(axes.flat, GRID_METRICS, strict=True):
        _law_panel(axis, result, metric)
        axis.set_xlabel(SIZE_LABEL.get(result.size, result.size))
    _shared_legend(fig, axes, "alpha")
    return fig


def _law_panel(axis: Any, result: StudyResult, metric: str) -> None:
    fit, held = result.fits[metric, "power"], result.holdouts[metric, "power"]
    floor = result.floors[metric]
    runs = result.gate.kept
    n = np.array([run.size(result.size) for run in runs], dtype=float)
    y = np.array([run.metric(metric) for run in runs]) - floor
    is_held = np.array([run.name in held.held for run in runs])
    if fit.converged:
        at = np.geomspace(n.min() / 1.25, n.max() * 1.25, 200)
        low, high = fit.interval(at, new_run=False)
        label = (
            f"$\\alpha$ = {fit.params['alpha']:.4f}  [{fit.intervals['alpha'][0]:.4f}, {fit.intervals['alpha'][1]:.4f}]\n$r$ = {fit.r:.4f}"
        )
        band = axis.fill_between(at, low - floor, high - floor, color=BAND, lw=0, label="95 % band of the law's line")
        axis.plot(at, fit.predict(at) - floor, color=FIT, lw=1.6, label=label)
        if np.nanmax(high - floor) > 3 * y.max():  # few points: the band would flatten the data
            band.remove()
    if held.prediction and held.fit:
        p = held.prediction
        span = np.geomspace(min(held.fit.x), p.x, 50)
        axis.plot(span, held.fit.predict(span) - floor, color=HELD, lw=1.4, ls=(0, (4, 3)), zorder=4, label="law without the largest size")
        bars = [[p.value - p.low], [p.high - p.value]]
        axis.errorbar(
            [p.x],
            [p.value - floor],
            yerr=bars,
            color=HELD,
            capsize=4,
            lw=1.4,
            fmt="x",
            ms=9,
            zorder=7,
            label="its prediction, 95 % interval",
        )
    axis.plot(n[~is_held], y[~is_held], "o", color=INK, ms=5, zorder=5, label="measured")
    axis.plot(n[is_held], y[is_held], "D", color="white", mec=HELD, mew=1.6, ms=6.5, zorder=6, label="held out, measured")
    axis.set_xscale("log")
    axis.set_yscale("log")
    decimal_log_axis(axis, "y")
    axis.set_title(LABELS[metric] + (f" − {floor:g}" if floor else "") + f"  (law with E = {floor:g})")
    if fit.converged:
        handles, labels = axis.get_legend_handles_labels()
        own = [i for i, text in enumerate(labels) if "alpha" in text]
        axis.legend([handles[i] for i in own], [labels[i] for i in own], loc="upper right")
    else:
        axis.text(0.5, 0.97, "no law: " + fit.reason, transform=axis.transAxes, ha="center", va="top", fontsize=7, wrap=True)


def compute_figure(result: StudyResult) -> Any:
    """The four metrics against training FLOPs for all healthy runs, the Pareto frontier and its law, as the paper's figure 6."""
    fig, axes = figure(2, 2, (9.2, 7.4))
    for axis, metric in zip(axes.flat, GRID_METRICS, strict=True):
        _curves(axis, result, metric, result.frontiers[metric])
        axis.set_xlabel("training FLOPs (exact)")
    _shared_legend(fig, axes, "alpha")
    return fig


def data_figure(result: StudyResult) -> Any:
    """The two losses against tokens for all healthy runs, the best at each number of tokens and its law."""
    fig, axes = figure(1, 2, (9.2, 4.4))
    for axis, metric in zip(axes.flat, ("loss_last", "loss_avg"), strict=True):
        _curves(axis, result, metric, result.data_frontiers[metric])
        axis.set_xlabel("tokens seen, repeats counted")
    _shared_legend(fig, axes, "alpha")
    return fig


def _curves(axis: Any, result: StudyResult, metric: str, front: Frontier) -> None:
    """The evaluations of every run along compute or tokens, a colour a size, and the frontier."""
    runs = result.healthy
    colours = size_colours(sorted({run.params_paper for run in runs}))
    seen: set[int] = set()
    for run in runs:
        points = evaluations([run], metric, front.along)
        name = None if run.params_paper in seen else f"d{run.depth}"
        seen.add(run.params_paper)
        axis.plot([p.x for p in points], [p.value for p in points], "-", marker=".", ms=4, lw=1.1, color=colours[run.params_paper],
                  label=name)  # fmt: skip
    axis.plot(
        [p.x for p in front.points], [p.value for p in front.points], "o", mfc="none", mec=INK, ms=6, mew=0.8, label="Pareto frontier"
    )
    if front.fit.converged:
        x = np.geomspace(min(front.fit.x), max(front.fit.x), 100)
        label = f"$\\alpha$ = {front.fit.params['alpha']:.4f}, $r$ = {front.fit.r:.3f}"
        axis.plot(x, front.fit.predict(x), color=FIT, lw=1.8, ls=(0, (5, 2)), label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    decimal_log_axis(axis, "y")
    axis.set_title(LABELS[metric])
    handles, labels = axis.get_legend_handles_labels()
    own = [k for k, text in enumerate(labels) if "alpha" in text]
    axis.legend([handles[k] for k in own], [labels[k] for k in own], loc="upper right")


def ridge_figure(result: StudyResult) -> Any:
    """The regions of irreducible part E and exponent alpha that the points of the losses allow, and the ridge along which they trade."""
    shown = [metric for metric in ("loss_last", "loss_avg") if result.fits[metric, "power_floor"].converged]
    if not shown:
        return None
    fig, axes = figure(1, 2, (9.2, 4.2))
    for axis, metric in zip(axes.flat, ("loss_last", "loss_avg"), strict=True):
        if metric not in shown:
            axis.set_axis_off()
            axis.set_title(f"{LABELS[metric]}: E is not fitted", fontsize=9)
            continue
        fit, assumed = result.fits[metric, "power_floor"], result.fits[metric, "power"]
        region = ridge_regions(fit)
        for (low, high), colour, name in ((region.most, BAND, "95 % region"), (region.half, DARK, "50 % region")):
            axis.fill_between(region.floors, low, high, color=colour, lw=0.8, label=name)
        inside = np.isfinite(region.most[0])
        axis.plot(region.floors[inside], region.best[inside], color=INK, lw=0.8, ls=(0, (2, 2)), label="best exponent at each E")
        axis.plot([fit.params["E"]], [fit.params["alpha"]], "x", color=HELD, ms=9, mew=1.8, label="best fit, E free")
        if assumed.converged:
            axis.plot(
                [assumed.params["E"]],
                [assumed.params["alpha"]],
                "o",
                mfc="none",
                mec=INK,
                ms=8,
                label=f"E = {assumed.params['E']:g} assumed",
            )
        axis.set_yscale("log")
        decimal_log_axis(axis, "y")
        axis.set_xlabel("irreducible part E, nats")
        axis.set_ylabel("exponent α")
        axis.set_title(LABELS[metric])
        axis.legend(loc="upper left")
    return fig


def _shared_legend(fig: Any, axes: Any, own: str) -> None:
    """One legend below all panels for what they share; labels with `own` in them stay in their panel."""
    shared: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if own not in label:
                shared.setdefault(label, handle)
    fig.legend(shared.values(), shared.keys(), loc="outside lower center", ncols=min(8, max(1, len(shared))))


def isoflop_figure(result: StudyResult) -> Any:
    """Loss against N at each compute budget, with parabolas and their minima."""
    if result.isoflop is None:
        return None
    fig, axes = figure(1, 1, (6.4, 4.6))
    axis = np.atleast_1d(np.asarray(axes)).flat[0]
    colours = size_colours(list(range(len(result.isoflop.curves))))
    for number, curve in enumerate(result.isoflop.curves):
        colour, n = colours[number], np.array(curve.sizes)
        axis.plot(n, curve.losses, "o", ms=5, color=colour, label=f"{curve.flops:.2g} FLOP")
        at = np.geomspace(n.min(), n.max(), 100)
        u = np.log(at) - float(np.log(n).mean())
        axis.plot(at, np.polyval(curve.coefficients[::-1], u), "-", lw=1.3, color=colour, label=f"parabola at {curve.flops:.2g} FLOP")
        if not curve.reason:
            axis.plot([curve.best_n], [curve.best_loss], "o", ms=10, mfc="none", mec=INK, label=f"minimum at {curve.flops:.2g} FLOP")
    axis.set_xscale("log")
    axis.set_xlabel(SIZE_LABEL["params_paper"])
    axis.set_title(LABELS["loss_avg"])
    handles, labels = axis.get_legend_handles_labels()
    own = [k for k, text in enumerate(labels) if text.endswith("FLOP") and " at " not in text]
    axis.legend([handles[k] for k in own], [labels[k] for k in own], loc="best")
    return fig


def residuals_figure(result: StudyResult) -> Any:
    """What the laws leave over, in percent, against N: structure here means that the form is wrong."""
    shown = [metric for metric in METRICS if result.fits[metric, "power"].converged]
    if not shown:
        return None
    fig, axes = figure(2, 2, (9.2, 6.2))
    for axis, metric in zip(axes.flat, GRID_METRICS, strict=True):
        axis.axhline(0, color="0.6", lw=0.8)
        for form, marker, colour in (("power", "o", FIT), ("power_floor", "s", HELD)):
            fit: LawFit = result.fits[metric, form]
            if fit.converged and not (form == "power_floor" and fit.params["E"] == 0):  # that is the power law once more
                name = "power law" if form == "power" else f"with floor E = {fit.params['E']:.3g}"
                left_over = 100 * (np.array(fit.y) / fit.predict(fit.x) - 1)
                axis.plot(fit.x, left_over, marker, color=colour, ms=5, mfc="none" if form != "power" else colour, label=name)
        axis.set_xscale("log")
        axis.margins(y=0.25)
        axis.set_xlabel(SIZE_LABEL.get(result.size, result.size))
        axis.set_ylabel("measured / fitted − 1, %")
        axis.set_title(LABELS[metric])
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="best")
    return fig


def per_scale_figure(result: StudyResult) -> Any:
    """Loss and error rate of each scale of the token pyramid, one line a size."""
    runs = [run for run in result.gate.kept if run.loss_per_scale and run.err_per_scale]
    if not runs:
        return None
    fig, axes = figure(1, 2, (9.2, 4.0))
    colours = size_colours(sorted({run.params_paper for run in runs}))
    for axis, field, title in zip(
        axes.flat, ("loss_per_scale", "err_per_scale"), ("cross-entropy, nats a token", "top-1 error, %"), strict=True
    ):
        seen: set[int] = set()
        for run in runs:
            values = np.array(getattr(run, field)) * (100 if field.startswith("err") else 1)
            name = None if run.params_paper in seen else f"d{run.depth}"
            seen.add(run.params_paper)
            axis.plot(range(1, len(values) + 1), values, "-o", ms=3.5, lw=1.2, color=colours[run.params_paper], label=name)
        axis.set_xlabel("scale (1 is one token)")
        axis.set_title(title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc="best", ncols=2)
    return fig
