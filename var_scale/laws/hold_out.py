"""A law tested on rows that its fit did not see: those of the largest size, or of the longest
training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from var_scale.errors import UserError
from var_scale.laws.api import fit
from var_scale.laws.forms import SURFACES, Array, Form
from var_scale.laws.law import LawFit, Prediction, plain

Along = Literal["size", "length"]


@dataclass(frozen=True)
class HeldRow:
    """A row that was held out, and its prediction."""

    name: str
    measured: float
    predicted: float
    low: float
    """95 % prediction interval; NaN for a fit without intervals."""
    high: float

    @property
    def relative_error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured value lies in the interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class HeldOut:
    """The test of a law."""

    along: Along
    at: float
    """The size or length that was held out."""
    fit: LawFit
    """The law of the other rows."""
    rows: tuple[HeldRow, ...]
    """Empty if that fit did not converge."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {
                "row": row.name,
                "measured": row.measured,
                "predicted": row.predicted,
                "low": row.low,
                "high": row.high,
                "relative_error": row.relative_error,
                "inside": row.inside,
            }
            for row in self.rows
        ]
        value: dict[str, Any] = plain({"along": self.along, "at": self.at, "rows": rows})
        return value | {"fit": self.fit.to_json()}


def hold_out_rows(
    along: Along,
    x: Sequence[float] | Array,
    y: Sequence[float] | Array,
    form: Form,
    *,
    d: Sequence[float] | Array | None = None,
    unique: Sequence[float] | Array | None = None,
    weights: Sequence[float] | Array | None = None,
    names: Sequence[str] = (),
    **options: Any,
) -> HeldOut:
    """Fit the rows without the largest size (or the most tokens), and predict these.

    Rows whose y is not a positive finite number are neither fitted nor predicted.

    Args:
        along: size holds out the rows of the largest x, length those of the largest d.
        options: the other arguments of `fit`.

    Raises:
        UserError: code `laws.option` for length without a surface, or as `fit` raises it.
    """
    if along == "length" and form not in SURFACES:
        raise UserError(
            f"hold-out by length: the form {form} has no lengths; hold out the largest size, or "
            f"use one of {', '.join(SURFACES)}",
            code="laws.option",
        )
    labels = list(names) or [str(row) for row in range(len(y))]
    columns = {"x": x, "y": y, "d": d, "unique": unique, "weights": weights}
    arrays = {key: np.asarray(v, dtype=float) for key, v in columns.items() if v is not None}
    sizes = arrays["x" if along == "size" else "d"]
    held = sizes == sizes.max()
    rest = {key: values[~held] for key, values in arrays.items()}
    law = fit(
        form=form, names=[labels[row] for row in np.flatnonzero(~held).tolist()], **rest, **options
    )
    rows = []
    for row in np.flatnonzero(held & np.isfinite(arrays["y"]) & (arrays["y"] > 0)).tolist():
        if not law.converged:
            break
        place: dict[str, float] = {
            key: float(arrays[key][row]) for key in ("d", "unique") if key in arrays
        }
        at = _prediction(law, float(arrays["x"][row]), place)
        rows.append(HeldRow(labels[row], float(arrays["y"][row]), at.value, at.low, at.high))
    return HeldOut(along, float(sizes.max()), law, tuple(rows))


def _prediction(law: LawFit, x: float, place: dict[str, float]) -> Prediction:
    """A new run at x, without an interval where the fit has none."""
    if law.form == "power" or len(law.draws):
        return law.at(x, **place)
    return Prediction(x, float(law.predict(x, **place)), float("nan"), float("nan"))
