"""Records of runs that are not run folders of var-scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from var_scale.cost.shape import ModelShape
from var_scale.records.record import METRICS, CurvePoint, RunRecord, record_of

IMAGENET, VALIDATION = 1281167, 50000
"""Images of the training and the validation set of ImageNet."""


def foreign_record(
    shape: ModelShape, images: int, curve: Sequence[CurvePoint], final: bool, **values: Any
) -> RunRecord:
    """A record whose metrics are those of the last point of the curve.

    Args:
        final: whether that point is the end of the run; otherwise the run has no metrics.
        values: other fields; those that are not given have neutral values.
    """
    known: dict[str, Any] = {
        "seed": 0,
        "loss_per_scale": (),
        "err_per_scale": (),
        "data_hash": "imagenet",
        "seconds": 0.0,
        "restarts": 0,
        "curve": tuple(curve),
        "eval_samples": VALIDATION,
        "reason": "",
        **dict(zip(METRICS, curve[-1][2:] if final and curve else [math.nan] * 4, strict=True)),
    }
    measured = {} if final else {"eval_samples": 0}
    return record_of(shape, images, **(known | values | measured))
