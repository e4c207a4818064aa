"""From run folders to report and sample grid."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from var_scale.cluster.next import advice, hours_spent
from var_scale.cluster.pictures import growth, samples
from var_scale.cluster.pipeline import Study
from var_scale.config.schema import Config
from var_scale.data.loader import TokenData
from var_scale.errors import UserError
from var_scale.files import read_json
from var_scale.progress import say
from var_scale.scales import cells
from var_scale.study.analyse import StudyResult, fit_study
from var_scale.study.holdout import HoldOut
from var_scale.study.laws import LawFit
from var_scale.study.record import METRICS, read_run
from var_scale.study.report import Plan, write_report


def build_report(study: Study) -> StudyResult:
    """Gate, fit, hold-out test, report files, and samples of the largest finished model."""
    records = [read_run(run.path) for _, run in study.runs() if (run.path / "run.json").exists()]
    if not records:
        raise UserError(f"{study.folder}: no run has started, so there is nothing to report; run the study first")
    result = fit_study(records, floors={str(metric): floor for metric, floor in study.spec.floors.items()},
                       exclude=study.spec.exclude, keep=study.spec.keep)  # fmt: skip
    for item in result.gate.excluded:
        say(f"gate: {item.record.name} excluded, {item.code}: {item.text}")
    for metric in METRICS:
        _say_law(metric, result.fits[metric, "power"], result.holdouts[metric, "power"])
    missing = _missing(study, result)
    for title, text in missing.items():
        say(f"{title}: {text}")
    pictures = {}
    kept = {record.name: record for record in result.gate.kept}
    for name, picture in (("samples", samples(study, kept)), ("growth", growth(study, kept))):
        if picture:
            pictures[name] = picture
    if (quality := study.report / "quality.png").exists():
        pictures["quality"] = quality
    if (reconstructions := study.folder / "tokenizer" / "reconstructions.png").exists():
        pictures["reconstructions"] = reconstructions
    write_report(study.folder, result, _facts(study) | missing, pictures, _plan(study, result))
    if study.config.log.wandb != "disabled":
        from var_scale.cluster.summary import log_summary

        log_summary(study, result)
    return result


def _say_law(metric: str, fit: LawFit, held: HoldOut) -> None:
    """One line a law: predicted against measured and against the step it had to predict, then the law of all sizes."""
    if held.prediction is None:
        say(f"{metric}: no hold-out test ({held.reason})")
    else:
        p = held.prediction
        where = "inside" if held.inside else "outside"
        say(f"{metric}: predicted {p.value:.4f} [{p.low:.4f}, {p.high:.4f}] for {', '.join(held.held)}, measured {held.measured:.4f}, "
            f"{where} the 95 % interval (off by {held.relative_error:+.2%}, {held.gain_fraction:.0%} of the step); "
            f"all sizes: {fit.equation}")  # fmt: skip


def _plan(study: Study, result: StudyResult) -> Plan:
    """What was planned, and what to run next with as many device-hours as the study took."""
    path = study.folder / "plan.json"
    rows = read_json(path, "plan")["rows"] if path.exists() else []
    expected = {str(row["name"]): (float(row["seconds"]), float(row["flops"])) for row in rows}
    hours = hours_spent(study)
    if not result.fits["loss_avg", "power"].converged or hours <= 0:
        return Plan(expected, ())
    return Plan(expected, [f"with as much again as the runs took, {hours:.3g} device-hours:", *advice(study, result, hours, "loss_avg")])


def _missing(study: Study, result: StudyResult) -> dict[str, str]:
    """What the plan has and the fits have not."""
    facts = {}
    started = {record.name for record in result.records}
    if absent := [config.name for config, _ in study.runs() if config.name not in started]:
        facts["Not started"] = ", ".join(absent)
    planned = tuple(config.name for config, _ in study.runs() if config.model.depth == max(study.spec.depths))
    held = result.holdouts["loss_avg", "power"].held
    if held and not set(held) <= set(planned):  # of a grid only the best point of each seed
        facts["Hold-out"] = f"planned for {', '.join(planned)}, which is not among the healthy runs; {', '.join(held)} was held out instead"
    return facts


def _facts(study: Study) -> dict[str, str]:
    """What else a reader needs to know about the measurements."""
    recipes: dict[str, list[str]] = {}
    for config, _ in study.runs():
        recipes.setdefault(_recipe(config), []).append(config.name)
    recipe = "; ".join(text if len(recipes) == 1 else f"{', '.join(names)}: {text}" for text, names in recipes.items())
    dropped = any(config.train.eval_label_dropout for config, _ in study.runs())
    facts = {
        "Recipe": recipe,
        "Evaluation": "labels dropped at the training rate, as the reference code does" if dropped else "true labels, no dropout (clean)",
    }
    tokenizer = study.folder / "tokenizer" / "tokenizer.json"
    if tokenizer.exists():
        t = read_json(tokenizer)
        facts["Tokenizer"] = (
            f"trained here; PSNR {t['psnr_db']:.2f} dB on {t['images']} validation images, codebook perplexity per scale "
            + ", ".join(f"{p:.0f}" for p in t["perplexity_per_scale"])
        )
    described = [read_json(run.path / "run.json") for _, run in study.runs() if (run.path / "run.json").exists()]
    if described:
        size = described[0]["train_samples"]
        shown = sorted({d["total_steps"] * d["global_batch"] / size for d in described})
        facts["Data"] = f"{size:,} different training images, each shown {' or '.join(f'{s:.3g}' for s in shown)} times in a whole run"
    for _, run in study.runs():
        if run.env.exists():
            env = read_json(run.env)
            where = f"{env['processor']}, {env['cores']} cores, device {env['device']}, {env['world_size']} processes"
            facts["Machine"] = f"{where}, precision {env['choices']['precision']}"
            break
    if baseline := _baseline(study):
        facts["Without a model"] = baseline
    return facts


def _baseline(study: Study) -> str:
    """What a guess scores on the validation tokens: uniform, and by the frequency of each code at each scale."""
    config = study.with_files()
    try:
        train, val = (TokenData(Path(str(folder))) for folder in (config.data.tokens_train, config.data.tokens_val))
    except UserError:
        return ""  # the tokens were removed after the runs
    seen_NL, tokens_NL = (data.gather(np.arange(min(16384, data.num_samples)))[0] for data in (train, val))
    edges = np.cumsum([0, *cells(config.tokenizer.patch_nums)])
    vocab = config.tokenizer.vocab_size
    losses, errors = [], []
    for start, stop in pairwise(edges):
        share_V, truth_V = (np.bincount(t[:, start:stop].ravel(), minlength=vocab) + add for t, add in ((seen_NL, 1.0), (tokens_NL, 0.0)))
        share_V, truth_V = share_V / share_V.sum(), truth_V / truth_V.sum()
        losses.append(-float(truth_V @ np.log(share_V)))
        errors.append(1 - float(truth_V[share_V.argmax()]))
    weights = np.diff(edges) / edges[-1]
    return (f"a uniform guess over {vocab} codes has loss {math.log(vocab):.4f}; guessing each code as often as it occurs at its scale "
            f"in training has L_last {losses[-1]:.4f}, L_avg {weights @ losses:.4f}, Err_last {errors[-1]:.4f}, Err_avg "
            f"{weights @ errors:.4f} on {len(tokens_NL):,} validation samples")  # fmt: skip


def _recipe(config: Config) -> str:
    """The recipe of a run in one line."""
    train = config.train
    length = f"{train.epochs:g} epoch{'s' if train.epochs != 1 else ''}" if train.epochs else f"{train.steps} steps"
    peak = train.base_lr * train.batch_size / 256
    engine = config.engine.name + (f" ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else "")
    return f"{length}, batch {train.batch_size}, peak learning rate {peak:.2g}, schedule {train.lr_schedule}, engine {engine}"
