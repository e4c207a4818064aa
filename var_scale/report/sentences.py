"""Advice on next runs as sentences, for commands and the report."""

from __future__ import annotations

import math

from var_scale.laws.design import Advice
from var_scale.records.optimum import Optimum


def advice_lines(advice: Advice, unit: str = "device-hours") -> list[str]:
    """The advised runs and what they do to the interval of the exponent."""
    each = [f"{count} x {c.name} ({c.cost:.3g} {unit} each)" for c, count in advice.runs]
    runs = "next: no run that fits the budget narrows the interval"
    if each:
        runs = f"next: {', '.join(each)}; {advice.cost:.3g} {unit}"
    return [
        runs,
        f"interval of the exponent: ±{advice.half_before:.2g} now, ±{advice.half_after:.2g} "
        "expected with these runs",
    ]


def optimum_sentence(best: Optimum) -> str:
    """The best run of a compute budget."""
    passes = f", {best.epochs:.3g} passes over the data" if math.isfinite(best.epochs) else ""
    low, high = best.depth_interval
    beyond = " (extrapolated)" if best.beyond else ""
    loss = f"{best.loss:.4f} ({best.loss_interval[0]:.4f} to {best.loss_interval[1]:.4f})"
    return (
        f"{best.flops:.2e} FLOP{beyond}: depth {best.depth:.1f} (95 % {low:.1f} to {high:.1f}), "
        f"N {best.n:.3g}, {best.tokens:.3g} tokens{passes}, loss {loss}; half the size, trained "
        f"longer, is {best.halved:+.4f} worse, twice the size {best.doubled:+.4f}"
    )
