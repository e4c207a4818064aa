"""A fitted floor beside a known one: which law is fitted, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_study import record
from var_scale.records.record import RunRecord
from var_scale.records.truth import Truth, compare_floor
from var_scale.report.theme import look, save
from var_scale.report.truth import truth_figure, truth_section

FLOORS = (1.5, 1.8, 1.9)
WEIGHTS = np.array([1, 4, 16]) / 21


def runs(
    lengths: tuple[int, ...] = (50_000, 100_000, 200_000), noise: float = 1e-3
) -> list[RunRecord]:
    """Five sizes by these lengths on a surface with floors per scale."""
    made = []
    for depth in range(2, 7):
        for images in lengths:
            base = record(depth)
            tokens = 21 * images
            rng = np.random.default_rng([depth, images])
            above = 400 * base.params_paper**-0.6 + 1200 * tokens**-0.6
            losses = (np.array(FLOORS) + above * np.array([0.6, 0.8, 1.0])) * np.exp(
                noise * rng.standard_normal(3)
            )
            made.append(
                replace(
                    base,
                    name=f"{base.name}-{images}",
                    images=images,
                    tokens=tokens,
                    loss_per_scale=tuple(losses.tolist()),
                    loss_avg=float(WEIGHTS @ losses),
                )
            )
    return made


def floor() -> dict[str, dict[str, object]]:
    """The content of floor.json."""
    exact = {"loss_per_scale": list(FLOORS), "loss_avg": float(WEIGHTS @ FLOORS)}
    return {
        "exact": exact | {"loss_per_scale_sem": [1e-4] * 3, "loss_avg_sem": 1e-4},
        "validation": exact,
    }


@pytest.fixture(scope="module")
def right() -> tuple[Truth, ...]:
    return compare_floor(runs(), floor(), draws=30)


def test_a_surface_finds_the_floor_of_every_scale(right: tuple[Truth, ...]) -> None:
    assert [truth.name for truth in right] == ["scale 1", "scale 2", "scale 3", "average"]
    for truth, exact in zip(right, (*FLOORS, float(WEIGHTS @ FLOORS)), strict=True):
        assert truth.exact == exact and truth.error == 1e-4 and truth.validation == exact
        assert truth.fit.form == "chinchilla" and truth.inside
        assert truth.fit.params["E"] == pytest.approx(exact, abs=0.03)


def test_a_wrong_floor_is_outside(right: tuple[Truth, ...]) -> None:
    """The same runs, with a floor that lies 0.3 nats below or above theirs."""
    for shift in (-0.3, 0.3):
        wrong = replace(right[-1], exact=right[-1].exact + shift)
        assert wrong.inside is False
        text = truth_section([wrong], "x")
        assert "**does not hold**" in text and "| **no** |" in text


def test_one_length_gives_a_law_of_size() -> None:
    """Its E contains the part of the data, so it lies above the exact floor by that much."""
    truth = compare_floor(runs((100_000,), 1e-5), floor())[-1]
    data = 1200 * (21 * 100_000) ** -0.6 * float(WEIGHTS @ [0.6, 0.8, 1.0])
    assert truth.fit.form == "power_floor"
    assert truth.fit.params["E"] - truth.exact == pytest.approx(data, abs=0.02)
    assert "what more data would still gain" in truth_section([truth], "x.png")


def test_the_section_and_its_picture(right: tuple[Truth, ...], tmp_path: Path) -> None:
    text = truth_section(right, "truth.png")
    average = right[-1].exact
    assert f"{average:.4f} nats (standard error 0.0001)" in text and "holds the exact" in text
    assert text.count("| yes |") == 4 and "](truth.png)" in text
    failed = replace(right[-1], fit=right[-1].fit.failed("too_few", "only two runs"))
    assert failed.inside is None and "only two runs" in truth_section([failed], "x")
    with look():
        fig = truth_figure(right, runs())
        assert len(fig.axes[0].lines) == 6 and len(fig.axes[1].lines) == 10
        assert save(fig, tmp_path, "truth").exists()
