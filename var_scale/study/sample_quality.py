"""`var-scale study quality`: samples of every size, compared with validation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_scale.data.manifest import MANIFEST_NAME
from var_scale.errors import UserError
from var_scale.evaluate.classifier import Classifier, suits, train_classifier
from var_scale.evaluate.extract import (
    compare_sets,
    features_of,
    load_extractor,
    read_reference,
    say_if_few,
)
from var_scale.evaluate.generate import Job, generate
from var_scale.evaluate.read_images import read_images
from var_scale.evaluate.source import choose_device, load_source
from var_scale.files import canonical_hash, read_json, write_json, write_text
from var_scale.laws.law import plain
from var_scale.machine import cores
from var_scale.model.sampling import Settings
from var_scale.progress import say
from var_scale.records.gate import gate
from var_scale.records.quality import Quality, fit_quality, follows
from var_scale.records.record import RunRecord, read_study
from var_scale.report.plots import figure_data
from var_scale.report.quality_figure import quality_figure, quality_section
from var_scale.report.theme import look, save
from var_scale.run_folder import RunFolder
from var_scale.study.advice import counted
from var_scale.study.checks import require_folder
from var_scale.study.study import QUALITY_NAME, Study, local
from var_scale.train.checkpoint import checkpoints
from var_scale.train.inputs import open_images


def study_quality(
    study: Study,
    count: int,
    extractor_text: str | None,
    reference: Path | None,
    settings: Settings,
    batch: int,
) -> None:
    """Sample a run of every size that passes the gate, at each checkpoint that it kept, and compare
    the samples with validation images. Where the study has small images with classes, a classifier
    that is trained on them also counts the samples that show their class.

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
    # The plan may have timed steps in this process on as many threads as a run has.
    torch.set_num_threads(cores())
    device = choose_device(None)
    kept = _first_seeds(
        gate(
            counted(study, read_study(study.folder)),
            exclude=study.spec.exclude,
            keep=study.spec.keep,
        ).kept
    )
    if not kept:
        raise UserError(
            f"{study.folder}: no run is healthy, so there is nothing to sample",
            code="study.no-healthy-run",
        )
    images = reference or Path(study.with_files().data.images_val or "data.images_val")
    if not images.exists():
        raise UserError(
            f"{images}: there are no images to compare samples with; set data.images_val, or give "
            "images or statistics of them with --reference",
            code="study.reference-missing",
        )
    extractor = load_extractor(extractor_text or f"tok:{study.folder / kept[-1].name}", device)
    truth = read_reference(images, extractor, study.config.tokenizer.image_size)
    judge, judged = _judge(study)
    rows, results = list[Quality](), list[dict[str, Any]]()
    for record, step, share in _moments(study, kept):
        source = load_source(str(study.folder / record.name), device, step=step)
        # The name holds a hash of weights and settings: samples of other ones are never reused.
        made = canonical_hash({**source.what, "count": count, **asdict(settings)})[:8]
        out = study.folder / "quality" / f"{record.name}-{made}.npz"
        job = Job(tuple(range(source.classes)), count, 0, settings)
        generate(source, job, out, "npz", batch)
        drawn = features_of(out, extractor)
        found = compare_sets(truth, drawn, extractor)
        if not rows:
            say_if_few(drawn, extractor)
        if judge:
            found["accuracy"] = judge.accuracy(_with_classes(out, job))
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        name = record.name if share == 1 else f"{record.name} at {share:.0%} of its training"
        say(f"{name}: " + ", ".join(f"{key} {v:.4g}" for key, v in numbers.items()))
        row = Quality(
            record.name,
            float(record.n),
            record.loss_avg,
            found[extractor.distance],
            share * record.flops_exact,
            found.get("accuracy", float("nan")),
            share,
        )
        rows.append(row)
        loss = {"loss_avg": record.loss_avg} if share == 1 else {}
        results.append({"run": record.name, "share": share, "flops": row.flops, **loss, **found})
    fits = fit_quality(rows, extractor.distance)
    for fit in fits:
        say(
            fit.equation
            if follows(fit)
            else f"{extractor.distance} follows no power law of {fit.variable} (r = {fit.r:.2f})"
        )
    title = f"{extractor.distance}, {count:,} samples, guidance {settings.cfg}".removesuffix(".0")
    with look():
        figure = quality_figure(rows, fits, title)
        path = save(figure, study.report, "quality")
    write_text(study.report / "quality.csv", figure_data(figure))
    write_json(
        study.report / QUALITY_NAME,
        {
            "stamp": stamp(study, count, settings),
            "runs": plain(results),
            "fits": [fit.to_json() for fit in fits],
            "count": count,
            "seed": 0,
            "settings": asdict(settings),
            "reference": str(images),
            **({"classifier": judged} if judge else {}),
        },
    )
    say(f"{path}; `var-scale study report` adds it to the report")


def stamp(study: Study, count: int, settings: Settings) -> str:
    """Identity of a measurement: how it samples, and the runs that there are to sample."""
    runs = [
        (run.path.name, run.status()["state"], run.status().get("step")) for _, run in study.runs()
    ]
    return canonical_hash([count, asdict(settings), study.data_hash(), runs])


def quality_sections(study: Study) -> list[str]:
    """The section of the report about samples; empty where they were not measured."""
    path = study.report / QUALITY_NAME
    if not path.exists() or not (study.report / "quality.png").exists():
        return []
    return [quality_section(read_json(path, "quality of samples"), "quality.png")]


def _moments(
    study: Study, records: Sequence[RunRecord]
) -> Iterator[tuple[RunRecord, int | None, float]]:
    """The checkpoints of these runs: the record, the step, and the share of the training."""
    for record in records:
        steps = [
            found.step for found in checkpoints(RunFolder(study.folder / record.name).checkpoints)
        ]
        if not steps:  # `load_source` reports what is missing
            yield record, None, 1.0
        for step in steps:
            yield record, step, step / steps[-1]


def _first_seeds(records: Sequence[RunRecord]) -> list[RunRecord]:
    """One run of each point of the study: the first of those that differ in the seed alone."""
    first = dict[str, RunRecord]()
    for record in records:
        first.setdefault(record.name.replace(f"-s{record.seed}", "", 1), record)
    return list(first.values())


def _judge(study: Study) -> tuple[Classifier | None, dict[str, float]]:
    """A classifier of the study's images and its accuracy on validation images; none where the
    study has no image shards on this machine, or large images."""
    config = study.with_files()
    folders = [config.data.images_train, config.data.images_val]
    if not all(f and local(f) and (Path(f) / MANIFEST_NAME).exists() for f in folders):
        return None, {}
    train, val = (open_images(config, folder) for folder in folders)
    if not suits(train):
        return None, {}
    judge = train_classifier(train, train.manifest.num_classes)
    real = (val.gather(part) for part in np.array_split(np.arange(val.num_samples), 16))
    accuracy = judge.accuracy(pair for pair in real if len(pair[1]))
    say(f"classifier: finds the class of {accuracy:.1%} of the validation images")
    return judge, {"validation": accuracy}


def _with_classes(samples: Path, job: Job) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images of a job with their classes, in batches."""
    start = 0
    for images in read_images(samples):
        numbers = range(start, start + len(images))
        yield images, np.array([job.image(i)[0] for i in numbers])
        start += len(images)
