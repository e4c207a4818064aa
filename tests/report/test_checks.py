"""The checklist of the report: each answer turns with what it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic_study import ladder, record
from var_scale.laws.adequacy import adequacy
from var_scale.laws.curve import fit_law
from var_scale.records.analyse import FORMS, StudyResult
from var_scale.records.gate import GateResult, best_of_variants, gate
from var_scale.records.holdout import hold_out
from var_scale.records.record import RunRecord
from var_scale.records.sizes import seed_noise, size_means
from var_scale.report.values import NO, OPEN, YES, checks

DEPTHS = (1, 2, 3, 4, 6, 8)
STRAIGHT = ladder(DEPTHS, noise=1e-4)


@pytest.fixture
def ask(fitted_ladder: StudyResult):  # type: ignore[no-untyped-def]
    """A function that returns the answers for a study of these runs. Of its fits it makes only
    those that the checklist reads, which are those of the average loss."""

    def answers(runs: Sequence[RunRecord]) -> dict[str, str]:
        passed = gate(runs)
        kept, beaten = best_of_variants(passed.kept)
        passed = GateResult(kept, (*passed.excluded, *beaten))
        points = size_means(passed.kept, "loss_avg")
        fits = {
            ("loss_avg", form): fit_law(
                form, points.sizes, points.values, rows=points.names, repeats=points.repeats
            )
            for form in FORMS
        }
        found = {
            key: adequacy(law, fits["loss_avg", "power_floor"] if key[1] == "power" else None)
            for key, law in fits.items()
            if law.converged
        }
        result = replace(
            fitted_ladder,
            records=tuple(runs),
            gate=passed,
            fits=fits,
            adequacy=found,
            holdouts={
                ("loss_avg", form): hold_out(passed.kept, "loss_avg", form) for form in FORMS
            },
            seed_sd={"loss_avg": seed_noise(passed.kept, "loss_avg")},
        )
        return checks(result)

    return answers


def with_blocks(runs: Sequence[RunRecord], spread: float) -> list[RunRecord]:
    """Runs whose differences between parts of the images scatter by `spread` of the loss; what all
    runs share, such as a hard part, does not count."""
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(64)
    return [
        replace(
            run,
            blocks=tuple(run.loss_avg + hard + spread * run.loss_avg * rng.standard_normal(64)),
        )
        for run in runs
    ]


def test_a_good_study(ask) -> None:  # type: ignore[no-untyped-def]
    """Every answer is yes except what was not measured."""
    seeds = [record(d, seed=s, noise=2e-4) for d in DEPTHS for s in (0, 1)]
    answers = ask(with_blocks(seeds, 0.01))
    assert {key for key, answer in answers.items() if answer != YES} == {"floor", "tuned"}
    assert ask(seeds)["evaluation"] == OPEN


def test_a_poor_study(ask) -> None:  # type: ignore[no-untyped-def]
    """Few sizes, one seed, a run that failed, a large error of evaluation, unknown data."""
    answers = ask([*ladder((4, 5, 6), noise=5e-3), record(7, state="failed")])
    for key in ("runs", "sizes", "seeds", "floor"):
        assert answers[key] == NO
    # The step is about 6 %, a quarter of which has to be 8 times as large as the spread of parts.
    assert ask(with_blocks(STRAIGHT, 0.3))["evaluation"] == NO
    assert ask(with_blocks(STRAIGHT, 0.03))["evaluation"] == YES
    assert ask([replace(run, blocks=(3.0,) * 4) for run in STRAIGHT])["evaluation"] == OPEN
    assert ask([replace(run, data_hash="") for run in STRAIGHT])["data"] == OPEN
    assert ask(STRAIGHT[:2])["foreseen"] == OPEN == ask(STRAIGHT[:3])["form"]
    assert ask(STRAIGHT[:2])["converged"] == NO


def test_a_prediction_that_fails(ask) -> None:  # type: ignore[no-untyped-def]
    """The largest size misses the law of the others."""
    assert ask(STRAIGHT)["foreseen"] == YES == ask(STRAIGHT)["failable"]
    missed = [*STRAIGHT[:-1], replace(STRAIGHT[-1], loss_avg=1.03 * STRAIGHT[-1].loss_avg)]
    assert ask(missed)["foreseen"] == NO


def test_a_bend(ask) -> None:  # type: ignore[no-untyped-def]
    """A law with a floor bends in logarithms. The law with a fitted floor then takes the place of
    the power law, and its prediction holds."""
    assert ask(STRAIGHT)["form"] == YES
    bent = [replace(run, loss_avg=3 + 0.6 * (run.params_paper / 1e6) ** -0.3) for run in STRAIGHT]
    assert ask(bent)["form"] == OPEN  # nothing measures the noise that a misfit must exceed
    again = [replace(run, seed=1, loss_avg=run.loss_avg * 1.0003) for run in bent]
    assert ask([*bent, *again])["form"] == YES
    wavy = [
        replace(run, loss_avg=run.loss_avg * (1 + 0.02 * (-1) ** k)) for k, run in enumerate(bent)
    ]
    seeds = [replace(run, seed=1, loss_avg=run.loss_avg * 1.0003) for run in wavy]
    assert ask([*wavy, *seeds])["form"] == NO  # more misfit than the noise between seeds explains
    assert ask(bent)["foreseen"] == YES == ask(bent)["failable"]


def test_a_straight_line_that_nothing_could_refute(ask) -> None:  # type: ignore[no-untyped-def]
    """Five sizes whose losses differ little: no bend is found, and none could have been."""
    flat = [
        replace(run, loss_avg=5 * (run.params_paper / 1e6) ** -0.01 * wobble)
        for run, wobble in zip(STRAIGHT[:5], (1.001, 0.999, 1.0, 1.001, 0.9995), strict=True)
    ]
    assert ask(flat)["form"] == OPEN


def test_a_prediction_that_is_worse_than_none(ask) -> None:  # type: ignore[no-untyped-def]
    """The measured value is inside of a wide interval, but further from the prediction than the
    next smaller size was."""
    wide = [
        replace(run, loss_avg=run.loss_avg * wobble)
        for run, wobble in zip(STRAIGHT, (1.0, 1.08, 0.96, 1.06, 0.97, 1.05), strict=True)
    ]
    assert ask(wide)["foreseen"] == NO


def test_learning_rates(ask) -> None:  # type: ignore[no-untyped-def]
    """A grid of three rates at every size, whose best rate is inside."""
    factors = {5e-4: 1.02, 1e-3: 1.0, 2e-3: 1.03}

    def grid(runs: Sequence[RunRecord]) -> list[RunRecord]:
        return [
            replace(run, name=f"{run.name}-{rate}", peak_lr=rate, loss_avg=run.loss_avg * factor)
            for run in runs
            for rate, factor in factors.items()
        ]

    assert ask(grid(STRAIGHT))["tuned"] == YES
    assert ask([*grid(STRAIGHT[:-1]), STRAIGHT[-1]])["tuned"] == NO
    factors[2e-3] = 0.99
    assert ask(grid(STRAIGHT))["tuned"] == NO
    assert ask([replace(run, peak_lr=0.0) for run in STRAIGHT])["tuned"] == OPEN


def test_learning_rates_of_a_sweep(fitted_ladder: StudyResult) -> None:
    """Another study tried the rates: each size must be trained at its best one."""
    runs = [replace(run, peak_lr=1e-3) for run in fitted_ladder.records]
    passed = replace(fitted_ladder.gate, kept=tuple(runs), excluded=())
    study = replace(fitted_ladder, records=tuple(runs), gate=passed)

    def answer(**losses: float) -> str:
        sweep = [
            replace(run, peak_lr=float(rate.removeprefix("at_")), loss_avg=loss)
            for run in runs
            for rate, loss in losses.items()
        ]
        return checks(replace(study, sweep=tuple(sweep)))["tuned"]

    assert checks(study)["tuned"] == NO
    assert answer(**{"at_5e-4": 3.1, "at_1e-3": 3.0, "at_2e-3": 3.2}) == YES
    assert answer(**{"at_1e-3": 3.1, "at_2e-3": 3.0, "at_4e-3": 3.2}) == NO  # trained at another
    assert answer(**{"at_5e-4": 3.1, "at_1e-3": 3.0}) == NO  # two rates
    assert answer(**{"at_5e-4": 3.1, "at_8e-4": 3.05, "at_1e-3": 3.0}) == NO  # at the edge


def test_the_answers_of_a_whole_study(fitted_ladder: StudyResult) -> None:
    """The same questions for a result of `fit_study`."""
    answers = checks(fitted_ladder)
    assert answers["runs"] == answers["seeds"] == NO and answers["evaluation"] == OPEN
    assert answers["sizes"] == answers["foreseen"] == answers["annealed"] == YES
