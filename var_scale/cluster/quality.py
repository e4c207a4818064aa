"""`var-scale study quality`: samples of every healthy run, measured against the study's validation images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from var_scale.cluster.pipeline import Study
from var_scale.errors import UserError
from var_scale.evaluate.extract import compare_sets, load_extractor, read_reference, say_if_few, statistics
from var_scale.evaluate.generate import Job, generate, read_images
from var_scale.evaluate.source import load_source
from var_scale.files import canonical_hash, write_json, write_text
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.study.gate import gate
from var_scale.study.laws import plain
from var_scale.study.plots import figure_data
from var_scale.study.quality import Quality, fit_quality, follows, quality_figure
from var_scale.study.record import read_study
from var_scale.study.theme import look, save


def study_quality(study: Study, count: int, extractor_text: str | None, reference: Path | None, settings: Settings, batch: int) -> None:
    """Sample `count` images of every run that passes the gate (kept in STUDY/quality, made once), measure them, write quality.json, .csv,
    .png, .svg and .pdf into the report's folder. Without an extractor the study's own tokenizer, FD-tok."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = gate(read_study(study.folder), exclude=study.spec.exclude, keep=study.spec.keep).kept
    if not kept:
        raise UserError(f"{study.folder}: no run is healthy, so there is nothing to sample")
    images = reference or Path(str(study.with_files().data.images_val))
    if not images.exists():
        raise UserError(f"--reference: {images} does not exist; give the validation images, or statistics of them")
    extractor = load_extractor(extractor_text or f"tok:{study.folder / kept[-1].name}", device)
    truth = read_reference(images, extractor)
    rows, results = [], list[dict[str, Any]]()
    for record in kept:
        source = load_source(str(study.folder / record.name), device)
        made = canonical_hash({**source.what, "count": count, **asdict(settings)})[:8]  # other weights or settings: another file
        out = study.folder / "quality" / f"{record.name}-{made}.npz"
        generate(source, Job(tuple(range(source.classes)), count, 0, settings), out, "npz", batch)
        drawn = statistics(read_images(out), extractor, label=f"features of {record.name}")
        found = compare_sets(truth, drawn, extractor)
        if record is kept[0]:
            say_if_few(drawn, extractor)
        say(f"{record.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float)))
        rows.append(Quality(record.name, float(record.params_paper), record.loss_avg, found[extractor.distance]))
        results.append({"run": record.name, "loss_avg": record.loss_avg, **found})
    fits = fit_quality(rows, extractor.distance)
    for fit in fits:
        say(fit.equation if follows(fit) else f"{extractor.distance} follows no power law of {fit.variable} here (r = {fit.r:.2f})")
    write_json(study.report / "quality.json", {"runs": plain(results), "fits": [fit.to_json() for fit in fits], "count": count,
                                              "seed": 0, "settings": asdict(settings), "reference": str(images)})  # fmt: skip
    with look():
        figure = quality_figure(rows, fits, f"{extractor.distance}, {count:,} samples, guidance {settings.cfg}".removesuffix(".0"))
        path = save(figure, study.report, "quality")
    write_text(study.report / "quality.csv", figure_data(figure))
    say(f"{path}; `var-scale study report` takes it into the report")
