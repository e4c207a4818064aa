"""The look of all pictures: colours, fonts, axes, legends and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from var_scale.records.record import RunRecord

INK, FIT, HELD, BAND = "#1b2733", "#1f6fb2", "#c8501e", "#1f6fb233"
DARK = "#1f6fb277"
"""Colours: text and measured points, fits, held-out runs, a band, and a darker band inside it."""
LABELS = {
    "loss_last": "$L_{last}$: loss of the last scale, nats",
    "loss_avg": "$L_{avg}$: loss of all scales, nats",
    "err_last": "$Err_{last}$: error rate of the last scale",
    "err_avg": "$Err_{avg}$: error rate of all scales",
}
SIZE_LABEL = "parameters N"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.hashsalt": "var-scale",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 200},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""The formats of a picture, and how `savefig` writes each."""


def look() -> Any:
    """A context in which matplotlib draws in this style; nothing outside it changes."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of `size` inches that belongs to no window, and its array of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig: Any, folder: Path, name: str, formats: Sequence[str] = ()) -> Path:
    """Write NAME.png (200 dpi), and NAME.svg and NAME.pdf where `formats` lists them.

    Equal inputs give equal files, since no file holds a date. A vector file of an earlier drawing
    that is not written again is removed, so that it cannot contradict the PNG.

    Returns:
        The path of the PNG.
    """
    from var_scale.files import atomic_file

    for ending, options in OPTIONS.items():
        path = folder / f"{name}.{ending}"
        if ending != "png" and ending not in formats:
            path.unlink(missing_ok=True)
            continue
        with atomic_file(path) as file:
            fig.savefig(file, format=ending, **options)
    return folder / f"{name}.png"


def log_axes(axis: Any) -> None:
    """Make both axes logarithmic, the vertical one with plain decimals where it is short."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    decimal_log_axis(axis, "y")


def decimal_log_axis(axis: Any, which: str) -> None:
    """Plain decimals at a handful of ticks on a log axis that spans less than two decades, where
    the default would show one power of ten, or labels that overlap."""
    from matplotlib.ticker import (
        EngFormatter,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    side = axis.yaxis if which == "y" else axis.xaxis
    low, high = axis.get_ylim() if which == "y" else axis.get_xlim()
    if high < 100 * low:
        few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        side.set_major_locator(few if high < 10 * low else LogLocator(subs=(1, 2, 5)))
        side.set_minor_formatter(NullFormatter())
        side.set_minor_locator(LogLocator(subs=[]))
        side.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.4g}" if value < 1e4 else EngFormatter()(value))
        )


def legend_of(axis: Any, own: Callable[[str], bool], loc: str) -> None:
    """A legend of those series of one panel whose label `own` accepts."""
    handles, labels = axis.get_legend_handles_labels()
    kept = [k for k, label in enumerate(labels) if own(label)]
    axis.legend([handles[k] for k in kept], [labels[k] for k in kept], loc=loc)


def shared_legend(fig: Any, axes: Any, own: str) -> None:
    """One legend below all panels; series with `own` in their label stay with their panel."""
    shared: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if own not in label:
                shared.setdefault(label, handle)
    columns = min(8, max(1, len(shared)))
    fig.legend(shared.values(), shared.keys(), loc="outside lower center", ncols=columns)


def run_styles(runs: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, dict[str, Any]]]:
    """Each run with the colour of its size; the first run of a size also has its label."""
    colours = size_colours(sorted({run.params_paper for run in runs}))
    first = {run.params_paper: run.name for run in reversed(runs)}
    for run in runs:
        label = f"d{run.depth}" if first[run.params_paper] == run.name else None
        yield run, {"color": colours[run.params_paper], "label": label}


def size_colours(sizes: Sequence[int]) -> dict[int, Any]:
    """A colour for each size, from light to dark."""
    from matplotlib import colormaps

    ramp = colormaps["viridis_r"]
    return {size: ramp(0.12 + 0.83 * i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}
