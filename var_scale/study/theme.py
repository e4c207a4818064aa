"""Look of the pictures: one place for colours, fonts, axes and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, FIT, HELD, BAND = "#1b2733", "#1f6fb2", "#c8501e", "#1f6fb233"
DARK = "#1f6fb277"
GRID_METRICS = ("loss_last", "loss_avg", "err_last", "err_avg")
LABELS = {
    "loss_last": "$L_{last}$: loss of the last scale, nats", "loss_avg": "$L_{avg}$: loss of all scales, nats",
    "err_last": "$Err_{last}$: error rate of the last scale", "err_avg": "$Err_{avg}$: error rate of all scales",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
    "grid.color": "#e3e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 7.5,
    "svg.hashsalt": "var-scale", "svg.fonttype": "path", "pdf.fonttype": 42, "savefig.facecolor": "white",
}  # fmt: skip


def look() -> Any:
    """A context in which matplotlib draws in this style; nothing outside it changes."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its array of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig: Any, folder: Path, name: str) -> Path:
    """NAME.png (200 dpi), NAME.svg and NAME.pdf (without a date, so equal inputs give equal files); returns the PNG."""
    from var_scale.files import atomic_file

    for ending, options in (("svg", {"metadata": {"Date": None}}), ("pdf", {"metadata": {"CreationDate": None}}), ("png", {"dpi": 200})):
        with atomic_file(folder / f"{name}.{ending}") as file:
            fig.savefig(file, format=ending, **options)
    return folder / f"{name}.png"


def decimal_log_axis(axis: Any, which: str) -> None:
    """Plain decimals on a log axis that spans less than a decade, at a handful of ticks."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    side = axis.yaxis if which == "y" else axis.xaxis
    low, high = axis.get_ylim() if which == "y" else axis.get_xlim()
    if high < 10 * low:
        side.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        side.set_minor_formatter(NullFormatter())
        side.set_minor_locator(LogLocator(subs=[]))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}" if value < 1e4 else EngFormatter()(value)))


def size_colours(sizes: Sequence[int]) -> dict[int, Any]:
    """Light to dark with size."""
    from matplotlib import colormaps

    ramp = colormaps["viridis_r"]
    return {size: ramp(0.12 + 0.83 * i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}
