"""Seeds of one size as one point of a fit, and the noise between them."""

from __future__ import annotations

from collections.abc import Sequence

from var_scale.laws.groups import Groups, group
from var_scale.records.record import RunRecord


def size_means(records: Sequence[RunRecord], metric: str, count: str = "n") -> Groups:
    """The geometric mean of a metric at each N, or at another count of the record."""
    return group(
        [run.name for run in records],
        [float(getattr(run, count)) for run in records],
        [run.metric(metric) for run in records],
    )


def seed_noise(records: Sequence[RunRecord], metric: str) -> float:
    """Pooled standard deviation of ln metric between runs of one size; NaN without repeats."""
    return size_means(records, metric).noise
