"""`var-scale study quality`: samples of every healthy run, compared with validation images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from var_scale.errors import UserError
from var_scale.evaluate.extract import (
    compare_sets,
    features_of,
    load_extractor,
    read_reference,
    say_if_few,
)
from var_scale.evaluate.generate import Job, generate
from var_scale.evaluate.source import choose_device, load_source
from var_scale.files import canonical_hash, write_json, write_text
from var_scale.laws.law import plain
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.records.gate import gate
from var_scale.records.quality import Quality, fit_quality, follows
from var_scale.records.record import read_study
from var_scale.report.plots import figure_data
from var_scale.report.quality_figure import quality_figure
from var_scale.report.theme import look, save
from var_scale.study.checks import require_folder
from var_scale.study.study import Study


def study_quality(
    study: Study,
    count: int,
    extractor_text: str | None,
    reference: Path | None,
    settings: Settings,
    batch: int,
) -> None:
    """Sample every run that passes the gate and compare the samples with validation images.

    Samples are kept in STUDY/quality and generated once. The report's folder gets quality.json,
    quality.csv and the picture.

    Args:
        count: images of every run.
        extractor_text: feature extractor as in `evaluate samples`; None: the study's tokenizer,
            whose distance is FD-tok.
        reference: images or statistics; None: the study's validation images.
        batch: images that are sampled at a time.

    Raises:
        UserError: no healthy run (code `study.no-healthy-run`), or no reference (code
            `study.reference-missing`).
    """
    require_folder(study)
    device = choose_device(None)
    kept = gate(read_study(study.folder), exclude=study.spec.exclude, keep=study.spec.keep).kept
    if not kept:
        raise UserError(
            f"{study.folder}: no run is healthy, so there is nothing to sample",
            code="study.no-healthy-run",
        )
    images = reference or Path(str(study.with_files().data.images_val))
    if not images.exists():
        raise UserError(
            f"--reference: {images} does not exist; give the validation images, or statistics of "
            "them",
            code="study.reference-missing",
        )
    extractor = load_extractor(extractor_text or f"tok:{study.folder / kept[-1].name}", device)
    truth = read_reference(images, extractor, study.config.tokenizer.image_size)
    rows, results = [], list[dict[str, Any]]()
    for record in kept:
        source = load_source(str(study.folder / record.name), device)
        # The name holds a hash of weights and settings: samples of other ones are never reused.
        made = canonical_hash({**source.what, "count": count, **asdict(settings)})[:8]
        out = study.folder / "quality" / f"{record.name}-{made}.npz"
        generate(source, Job(tuple(range(source.classes)), count, 0, settings), out, "npz", batch)
        drawn = features_of(out, extractor)
        found = compare_sets(truth, drawn, extractor)
        if record is kept[0]:
            say_if_few(drawn, extractor)
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        say(f"{record.name}: " + ", ".join(f"{key} {v:.4g}" for key, v in numbers.items()))
        size, distance = float(record.params_paper), found[extractor.distance]
        rows.append(Quality(record.name, size, record.loss_avg, distance))
        results.append({"run": record.name, "loss_avg": record.loss_avg, **found})
    fits = fit_quality(rows, extractor.distance)
    for fit in fits:
        say(
            fit.equation
            if follows(fit)
            else f"{extractor.distance} follows no power law of {fit.variable} (r = {fit.r:.2f})"
        )
    write_json(
        study.report / "quality.json",
        {
            "runs": plain(results),
            "fits": [fit.to_json() for fit in fits],
            "count": count,
            "seed": 0,
            "settings": asdict(settings),
            "reference": str(images),
        },
    )
    title = f"{extractor.distance}, {count:,} samples, guidance {settings.cfg}".removesuffix(".0")
    with look():
        figure = quality_figure(rows, fits, title)
        path = save(figure, study.report, "quality")
    write_text(study.report / "quality.csv", figure_data(figure))
    say(f"{path}; `var-scale study report` adds it to the report")
