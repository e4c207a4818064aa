"""From a study's run folders to its report: laws, pictures, and facts about the measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from var_scale.config.schema import Config
from var_scale.data.loader import TokenData
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.laws.law import LawFit
from var_scale.progress import say
from var_scale.records.analyse import StudyResult
from var_scale.records.holdout import HoldOut
from var_scale.records.record import METRICS, read_run
from var_scale.records.runs_csv import read_runs_csv
from var_scale.report.report import Plan, write_report
from var_scale.scales import cells
from var_scale.study.advice import advice, fitted, hours_spent
from var_scale.study.pictures import growth, samples
from var_scale.study.sample_quality import quality_sections
from var_scale.study.study import Study
from var_scale.study.summary import log_summary
from var_scale.study.truth import truth_sections


def build_report(study: Study, formats: Sequence[str] = ("png",)) -> StudyResult:
    """Gate, fit, hold-out test, report files, and samples of the largest finished model.

    Args:
        formats: formats of the report's figures: png, svg, pdf.

    Raises:
        UserError: no run has started (code `study.no-runs`).
    """
    result = analyse(study)
    for item in result.gate.excluded:
        say(f"gate: {item.record.name} excluded, {item.code}: {item.text}")
    for metric in METRICS:
        _say_law(metric, result.law(metric), result.holdout(metric))
    missing = _missing(study, result)
    for title, text in missing.items():
        say(f"{title}: {text}")
    kept = {record.name: record for record in result.gate.kept}
    found = {
        "samples": samples(study, kept),
        "growth": growth(study, kept),
        "reconstructions": study.folder / "tokenizer" / "reconstructions.png",
    }
    pictures = {name: path for name, path in found.items() if path and path.exists()}
    facts, plan = _facts(study) | missing, _plan(study, result)
    sections = [*quality_sections(study), *truth_sections(study, result, formats)]
    write_report(study.folder, result, facts, pictures, plan, formats=formats, sections=sections)
    if study.config.log.wandb != "disabled":
        log_summary(study, result)
    return result


def update_summary(study: Study) -> None:
    """Fit the runs so far for the study's summary on wandb; the report is not written."""
    log_summary(study, analyse(study))


def analyse(study: Study) -> StudyResult:
    """Gate, fits and hold-out tests of the study's runs that have started."""
    records = [read_run(run.path) for _, run in study.runs() if (run.path / "run.json").exists()]
    if not records:
        raise UserError(
            f"{study.folder}: no run has started, so there is nothing to report; "
            "run the study first",
            code="study.no-runs",
        )
    result = fitted(study, records)
    rates = study.rates_table()
    return replace(result, sweep=tuple(read_runs_csv(rates))) if rates else result


def _say_law(metric: str, fit: LawFit, held: HoldOut) -> None:
    """Print one law: predicted against measured and against the step that had to be predicted,
    then the law of all sizes."""
    if held.prediction is None:
        say(f"{metric}: no hold-out test ({held.reason})")
    else:
        p = held.prediction
        where = "inside" if held.inside else "outside"
        say(
            f"{metric}: predicted {p.value:.4f} [{p.low:.4f}, {p.high:.4f}] for "
            f"{', '.join(held.held)}, measured {held.measured:.4f}, {where} the 95 % interval "
            f"(off by {held.relative_error:+.2%}, {held.gain_fraction:.0%} of the step); "
            f"all sizes: {fit.equation}"
        )


def _plan(study: Study, result: StudyResult) -> Plan:
    """What was planned, and what to run next with as many device-hours as the study took."""
    path = study.folder / "plan.json"
    rows = read_json(path, "plan")["rows"] if path.exists() else []
    expected = {str(row["name"]): (float(row["seconds"]), float(row["flops"])) for row in rows}
    hours = hours_spent(study, result)
    if not result.fits["loss_avg", "power"].converged or hours <= 0:
        return Plan(expected, ())
    budget = f"with as much again as the runs took, {hours:.3g} device-hours:"
    return Plan(expected, [budget, *advice(study, result, hours, "loss_avg")])


def _missing(study: Study, result: StudyResult) -> dict[str, str]:
    """What the plan contains and the fits do not."""
    facts = {}
    started = {record.name for record in result.records}
    if absent := [config.name for config, _ in study.runs() if config.name not in started]:
        facts["Not started"] = ", ".join(absent)
    planned = tuple(
        config.name for config, _ in study.runs() if config.model.depth == max(study.spec.depths)
    )
    held = result.holdout("loss_avg").held
    # Of a grid only the best point of each seed is held out.
    if held and not set(held) <= set(planned):
        facts["Hold-out"] = (
            f"planned for {', '.join(planned)}, which is not among the healthy runs; "
            f"{', '.join(held)} was held out instead"
        )
    return facts


def _facts(study: Study) -> dict[str, str]:
    """What else a reader of the report needs to know about the measurements."""
    recipes: dict[str, list[str]] = {}
    for config, _ in study.runs():
        recipes.setdefault(_recipe(config), []).append(config.name)
    recipe = "; ".join(
        text if len(recipes) == 1 else f"{', '.join(names)}: {text}"
        for text, names in recipes.items()
    )
    dropped = any(config.train.eval_label_dropout for config, _ in study.runs())
    facts = {
        "Recipe": recipe,
        "Evaluation": "labels dropped at the training rate, as the reference code does"
        if dropped
        else "true labels, no dropout (clean)",
    }
    tokenizer = study.folder / "tokenizer" / "tokenizer.json"
    if tokenizer.exists():
        t = read_json(tokenizer)
        perplexities = ", ".join(f"{p:.0f}" for p in t["perplexity_per_scale"])
        facts["Tokenizer"] = (
            f"trained here; PSNR {t['psnr_db']:.2f} dB on {t['images']} validation images, "
            f"codebook perplexity per scale {perplexities}"
        )
    descriptions = [run.path / "run.json" for _, run in study.runs()]
    if described := [read_json(path) for path in descriptions if path.exists()]:
        size = described[0]["train_samples"]
        shown = sorted({d["total_steps"] * d["global_batch"] / size for d in described})
        facts["Data"] = (
            f"{size:,} different training images, each shown "
            + ("once" if shown == [1] else f"{' or '.join(f'{s:.3g}' for s in shown)} times")
            + " in a whole run"
        )
    if environment := next((run.env for _, run in study.runs() if run.env.exists()), None):
        env = read_json(environment)
        count = env["world_size"]
        facts["Machine"] = (
            f"{env['processor']}, {env['cores']} cores, device {env['device']}, {count} "
            f"process{'es' if count > 1 else ''} per run, precision {env['choices']['precision']}"
        )
    if baseline := _baseline(study):
        facts["Without a model"] = baseline
    return facts


def _baseline(study: Study) -> str:
    """The loss and error of a guess on the validation tokens, uniform or by the frequency of each
    code at each scale; empty when the tokens were removed after the runs."""
    config = study.with_files()
    try:
        train, val = (
            TokenData(Path(str(folder)))
            for folder in (config.data.tokens_train, config.data.tokens_val)
        )
    except UserError:
        return ""
    seen_NL, tokens_NL = (
        data.gather(np.arange(min(16384, data.num_samples)))[0] for data in (train, val)
    )
    edges = np.cumsum([0, *cells(config.tokenizer.patch_nums)])
    vocab = config.tokenizer.vocab_size
    losses, errors = [], []
    for start, stop in pairwise(edges):
        # In training every code counts once more than it occurs, so that no validation code has
        # probability zero.
        share_V, truth_V = (
            np.bincount(t[:, start:stop].ravel(), minlength=vocab) + add
            for t, add in ((seen_NL, 1.0), (tokens_NL, 0.0))
        )
        share_V, truth_V = share_V / share_V.sum(), truth_V / truth_V.sum()
        losses.append(-float(truth_V @ np.log(share_V)))
        errors.append(1 - float(truth_V[share_V.argmax()]))
    weights = np.diff(edges) / edges[-1]
    return (
        f"a uniform guess over {vocab} codes has loss {math.log(vocab):.4f}; guessing each code as "
        f"often as it occurs at its scale in training has L_last {losses[-1]:.4f}, L_avg "
        f"{weights @ losses:.4f}, Err_last {errors[-1]:.4f}, Err_avg {weights @ errors:.4f} on "
        f"{len(tokens_NL):,} validation samples"
    )


def _recipe(config: Config) -> str:
    """The recipe of a run in one line."""
    train, engine = config.train, str(config.engine.name)
    length = (
        f"{train.epochs:g} epoch{'s' if train.epochs != 1 else ''}"
        if train.epochs
        else f"{train.steps} steps"
    )
    peak = train.base_lr * train.batch_size / 256
    if engine == "deepspeed":
        engine += f" ZeRO-{config.engine.zero_stage}"
    return (
        f"{length}, batch {train.batch_size}, peak learning rate {peak:.2g}, "
        f"schedule {train.lr_schedule}, engine {engine}"
    )
