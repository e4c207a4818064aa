"""The section of a report about a floor that is known: table, verdict and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from var_scale.progress import short
from var_scale.records.record import RunRecord
from var_scale.records.truth import Truth
from var_scale.report.report import table
from var_scale.report.theme import (
    INK,
    SIZE_LABEL,
    decimal_log_axis,
    figure,
    log_axes,
    size_colours,
)
from var_scale.report.values import number, percent, span

HEAD = (
    "loss of",
    "exact E",
    "E on these tokens",
    "fitted E",
    "95 %",
    "holds it?",
    "α",
    "β",
    "residual sd",
)


def truth_section(truths: Sequence[Truth], picture: str) -> str:
    """The section as Markdown; `picture` is the link to the figure."""
    lines = ["## Is the irreducible loss right?", "", _verdict(truths), ""]
    lines.append(table(HEAD, [_row(truth) for truth in truths]))
    lines += ["", _explanation(truths), ""]
    lines += [f"![Loss above the exact floor against size and data]({picture})", ""]
    lines += [
        "*Average loss above the exact floor against size, one line per length, and against data, "
        "one line per size. The solid lines are the fitted law.*"
    ]
    return "\n".join(lines)


def _verdict(truths: Sequence[Truth]) -> str:
    """One sentence on the law of the average loss."""
    average = truths[-1]
    exact = f"The smallest possible average loss of these data is {average.exact:.4f} nats"
    exact += f" (standard error {average.error:.1g})." if average.error else "."
    if not average.fit.converged:
        return f"{exact} There is no law with a fitted E to compare with: {average.fit.reason}."
    interval, fitted = span(average.fit.intervals["E"]), average.fit.params["E"]
    return (
        f"{exact} The law with a fitted E gives {fitted:.4f} ({fitted - average.exact:+.4f}); its "
        f"95 % interval, {interval}, {'holds' if average.inside else '**does not hold**'} the "
        "exact value."
    )


def _explanation(truths: Sequence[Truth]) -> str:
    """What the columns mean."""
    text = "The fit does not know the exact value. "
    if any(math.isfinite(truth.validation) for truth in truths):
        text += (
            "One who knows the data scores `E on these tokens` on the study's validation tokens, "
            "which all runs share: it differs from the expectation by the choice of samples, and a "
            "fit approaches it. "
        )
    if truths[-1].fit.form == "power_floor":
        text += (
            "All runs have the same length, so the fitted E contains what more data would still "
            "gain. "
        )
    return text.strip()


def _row(truth: Truth) -> list[str]:
    """One row of the table."""
    start = [truth.name, number(truth.exact), number(truth.validation)]
    fit = truth.fit
    if not fit.converged:
        return [*start, "none", "", f"no law: {fit.reason}", "", "", ""]
    beta = number(fit.params["beta"], 3) if fit.form == "chinchilla" else ""
    return [
        *start,
        number(fit.params["E"]),
        span(fit.intervals["E"]),
        "yes" if truth.inside else "**no**",
        number(fit.params["alpha"], 3),
        beta,
        percent(fit.residual_sd),
    ]


def truth_figure(truths: Sequence[Truth], runs: Sequence[RunRecord]) -> Any:
    """The average loss above the exact floor against N and against D, in logarithms, with the
    fitted law. `runs` are those of the fit."""
    average = truths[-1]
    fig, axes = figure(1, 2, (9.2, 4.2))
    n, d = (np.array([float(getattr(r, key)) for r in runs]) for key in ("n", "tokens"))
    above = np.array(average.losses) - average.exact
    for axis, x, other, label in (
        (axes[0, 0], n, d, SIZE_LABEL),
        (axes[0, 1], d, n, "tokens D"),
    ):
        colours = size_colours(sorted(set(other.tolist())))
        for value, colour in colours.items():
            here = (other == value) & (above > 0)
            name = f"{'D' if axis is axes[0, 0] else 'N'} = {short(value)}"
            axis.plot(x[here], above[here], "o", ms=4, color=colour, label=name)
            if average.fit.converged and len(set(x[here].tolist())) > 1:
                at = np.geomspace(x[here].min(), x[here].max(), 50)
                place = (
                    (at, np.full_like(at, value))
                    if axis is axes[0, 0]
                    else (
                        np.full_like(at, value),
                        at,
                    )
                )
                law = average.fit.predict(
                    *(place if average.fit.form == "chinchilla" else place[:1])
                )
                axis.plot(at, law - average.exact, "-", lw=1.2, color=colour)
        log_axes(axis)
        decimal_log_axis(axis, "x")
        axis.set_xlabel(label)
        axis.legend(loc="lower left")
    axes[0, 0].set_ylabel("average loss above the exact floor, nats", color=INK)
    return fig
