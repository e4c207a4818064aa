"""The health gate, and the points of a grid that compete."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tests.synthetic_study import ladder, record
from var_scale.records.analyse import StudyResult, fit_study
from var_scale.records.gate import best_of_variants, gate
from var_scale.records.record import METRICS, RunRecord


def test_gate_codes() -> None:
    """Each fault has its code, and a healthy run beside it stays."""
    good = [record(d) for d in (2, 3, 5)]
    nan = {m: math.nan for m in METRICS}
    bad = {
        "incomplete": record(4, state="running"),
        "diverged": record(4, state="diverged", reason="the loss is nan"),
        "failed": record(4, state="failed"),
        "non_finite": record(4, loss_last=math.inf),
        "not_annealed": record(4, final_lr_fraction=0.5),
        "missing_evaluation": record(4, eval_samples=0, **nan),
        "worse_than_smaller": record(4, loss_avg=good[1].loss_avg * 1.02),
        "data_differs": record(4, data_hash="other"),
    }
    for code, run in bad.items():
        result = gate([*good, run])
        assert [(e.code, e.record) for e in result.excluded] == [(code, run)]
        assert result.kept == tuple(good)
    assert gate([*good, record(4, loss_avg=good[1].loss_avg * 1.002)]).excluded == ()
    assert gate([*good, record(4, final_lr_fraction=math.nan)]).excluded[0].code == "not_annealed"
    assert gate([]).kept == ()


def test_the_user_overrules_the_gate() -> None:
    """A run is excluded with the user's reason; one that was not annealed is kept; one without a
    value cannot be kept."""
    runs = ladder()
    runs[1] = replace(runs[1], final_lr_fraction=0.5)
    nan = dict.fromkeys(METRICS, math.nan)
    runs[2] = replace(runs[2], **nan)  # type: ignore[arg-type]
    result = fit_study(
        runs,
        exclude={runs[0].name: "another tokenizer"},
        keep={runs[1].name: "constant on purpose", runs[2].name: "?"},
    )
    codes = [(item.record.name, item.code) for item in result.gate.excluded]
    assert codes == [(runs[0].name, "by_hand"), (runs[2].name, "missing_evaluation")]
    assert runs[1] in result.gate.kept and result.gate.excluded[0].text == "another tokenizer"


def test_points_of_a_grid_compete(fitted_ladder: StudyResult) -> None:
    """Of several runs of a size and seed the best one enters the laws, the others are named. All of
    them enter the frontier."""
    runs = ladder(noise=0.001)
    worse = [replace(run, name=f"{run.name}-lr", loss_avg=run.loss_avg * 1.004) for run in runs]
    both = fit_study([*runs, *worse])
    assert both.gate.kept == fitted_ladder.gate.kept
    for form in ("power", "power_floor"):
        assert both.fits["loss_avg", form].params == fitted_ladder.fits["loss_avg", form].params
    beaten = [item for item in both.gate.excluded if item.code == "beaten_variant"]
    assert sorted(item.record.name for item in beaten) == sorted(run.name for run in worse)
    assert runs[0].name in beaten[0].text
    assert {run.name for run in both.healthy} == {run.name for run in [*runs, *worse]}


def test_laws_of_size_compare_equal_data() -> None:
    """Small sizes trained for more lengths than the large ones: a law of N takes the longest length
    that all sizes have, although the small sizes have better runs; the surface takes all."""
    runs = ladder(noise=0.001)
    longer = [
        replace(run, name=f"{run.name}-long", images=2 * run.images, loss_avg=0.98 * run.loss_avg)
        for run in runs[:3]
    ]
    result = fit_study([*runs, *longer])
    assert result.gate.kept == fit_study(runs).gate.kept
    left_out = [(item.record.name, item.code) for item in result.gate.excluded]
    assert sorted(left_out) == sorted((run.name, "other_length") for run in longer)
    assert "every size has a run of" in result.gate.excluded[0].text
    assert len(result.healthy) == len(runs) + 3
    # Without a length that all sizes have, each size has its best run.
    alone = [replace(run, images=(k + 1) * run.images) for k, run in enumerate(runs)]
    assert fit_study(alone).gate.excluded == ()


def test_equal_data_in_grids_and_several_lengths() -> None:
    """A grid of rates competes within the shared length. Of several lengths, all are too short but
    the longest that every size has. A seed without the shared length is named."""
    runs = ladder(noise=0.001)

    def variant(run: RunRecord, name: str, factor: float, loss: float, **values: Any) -> RunRecord:
        images = int(factor * run.images)
        new = replace(run, name=f"{run.name}-{name}", images=images, loss_avg=loss * run.loss_avg)
        return replace(new, **values)

    rates = [variant(run, "rate", 1, 1.01) for run in runs]
    short = [variant(run, "short", 0.5, 1.05) for run in runs]
    long = [variant(run, "long", 2, 0.95) for run in runs[:-1]]
    seed = variant(runs[0], "seed", 2, 0.95, seed=7)
    result = fit_study([*runs, *rates, *short, *long, seed])
    assert [run.name for run in result.gate.kept] == [run.name for run in runs]
    codes = {item.record.name: item.code for item in result.gate.excluded}
    assert codes == {run.name: "beaten_variant" for run in rates} | {
        run.name: "other_length" for run in (*short, *long, seed)
    }
    # Two lengths, neither of which all sizes have: every size has its best run, of any length.
    apart = [variant(run, "long", 2 if k % 2 else 1, 1) for k, run in enumerate(runs)]
    worse = [variant(run, "short", 0.5 if k % 2 else 0.25, 1.05) for k, run in enumerate(runs)]
    kept, beaten = best_of_variants([*apart, *worse])
    assert kept == tuple(apart) and {item.code for item in beaten} == {"beaten_variant"}
