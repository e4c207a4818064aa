"""The roofline plot of a result: the rate of each operator below the ceilings of the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#1f6fb2", "#c8581f", "#2f8f4e", "#7a5195", "#b5892b", "#c2417c", "0.3")
"""The colours of the operators, in the order of the rows."""
MARKERS = {"eager": "o", "compile": "s", "ours": "D"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG of the arithmetic intensity against the rate, forward and backward.

    The intensity is in FLOP per byte of the declared floors, and the rate is in FLOP/s.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    copy, product = (
        results["ceilings"]["copy_bytes_per_s"],
        results["ceilings"]["product_flop_per_s"],
    )
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    widest = max(
        (
            f / b
            for row in results["rows"]
            for f, b in zip(row["flops"], row["bytes"], strict=True)
            if b
        ),
        default=1.0,
    )
    edges = [0.5, product / copy, 2 * max(widest, product / copy)]
    axis.plot(
        edges,
        [min(product, copy * x) for x in edges],
        color="0.2",
        lw=1.4,
        label="copy and product rate, measured here",
    )
    colours = dict(
        zip(dict.fromkeys(row["operator"] for row in results["rows"]), COLOURS, strict=False)
    )
    for row in results["rows"]:
        colour = colours[row["operator"]]
        for name, form in row["forms"].items():
            marker = MARKERS.get(name, "^")
            for place, what in enumerate(("forward", "backward")):
                if what not in form or not row["flops"][place] or not row["bytes"][place]:
                    continue
                intensity, rate = (
                    row["flops"][place] / row["bytes"][place],
                    row["flops"][place] / (1e-3 * form[what]["p50"]),
                )
                face = colour if what == "forward" else "none"
                axis.plot(
                    intensity,
                    rate,
                    marker,
                    color=colour,
                    mfc=face,
                    ms=7 if name == "ours" else 4,
                    ls="",
                )
                if name == "ours" and what == "forward":
                    axis.annotate(
                        row["shape"],
                        (intensity, rate),
                        xytext=(4, 3),
                        textcoords="offset points",
                        fontsize=5,
                        color=colour,
                    )
    for operator, colour in colours.items():
        axis.plot([], [], "D", color=colour, label=operator)
    for name, marker in {**MARKERS, "another library": "^"}.items():
        axis.plot([], [], marker, color="0.4", ls="", label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte")
    axis.set_ylabel("FLOP/s")
    axis.set_title(f"{results['device']}, {results['date']}  (filled: forward, open: backward)")
    axis.legend(loc="lower right", fontsize=7)
    figure.savefig(path, dpi=150)
