"""The stages of a study from images to report.

Each stage finds out itself whether it is done, so a study can be stopped anywhere and run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from var_scale.config.load import write_config
from var_scale.config.schema import Config, EngineConfig
from var_scale.errors import UserError
from var_scale.files import read_json, write_json
from var_scale.progress import say
from var_scale.records.analyse import StudyResult
from var_scale.run_folder import RunFolder
from var_scale.scales import length
from var_scale.study.checks import require_matching_runs
from var_scale.study.data_checks import require_splits
from var_scale.study.study import ENDED, QUALITY_NAME, Study
from var_scale.study.token_sets import make_tokens
from var_scale.train.create import create_run


def nothing_to_do(study: Study) -> bool:
    """Whether the study is complete; if so, this is printed with the place of its report."""
    if complete := study.complete():
        report = study.report / "report.html"
        say(f"study {study.config.name} is complete, nothing to do. Report: {report}")
    return complete


def prepare_data(study: Study) -> None:
    """Images, tokenizer and tokens of a study."""
    config = study.with_files()
    if study.config.data.teacher:
        make_tokens(study)
        return
    if study.config.data.shapes:
        make_shapes(config)
    if not study.config.tokenizer.weights:
        train_tokenizer_stage(config, Path(str(config.tokenizer.weights)).parent)
    if not study.config.data.tokens_train and not config.data.online:
        tokenize_stage(config)


def make_shapes(config: Config) -> None:
    """Generate the embedded image set as WebDataset shards, both splits."""
    from var_scale.data.embedded import ShapesSettings, write_shapes

    shapes = config.data.shapes
    assert shapes is not None
    settings = ShapesSettings(**shapes.model_dump(exclude={"train_images", "val_images"}))
    for split, count in (("train", shapes.train_images), ("val", shapes.val_images)):
        folder = Path(str(getattr(config.data, f"images_{split}")))
        manifest = write_shapes(folder, split, count, settings, config.data.samples_per_shard)
        say(f"images {split}: {manifest.num_samples:,} in {len(manifest.shards)} shards ({folder})")


def train_tokenizer_stage(config: Config, folder: Path, processes: int = 1) -> None:
    """Train the tokenizer on the image shards: in this process, or with torchrun on several."""
    from var_scale.train.inputs import open_images
    from var_scale.train.tokenizer import train_tokenizer

    train, val = (
        open_images(config, images, processes)
        for images in (config.data.images_train, config.data.images_val)
    )
    if processes == 1:
        train_tokenizer(config, train, val, folder)
        return
    from var_scale.jobs.local import run_workers

    engine = EngineConfig(name="ddp", processes=processes, threads=config.engine.threads)
    config = config.model_copy(update={"engine": engine, "study": None})
    write_config(config, folder / "config.yaml")
    run_workers(config, folder, "var_scale.train.tokenizer")


def tokenize_stage(config: Config) -> None:
    """Encode image shards as token shards, every split that the config names."""
    from var_scale.train.encode import tokenize

    for split in require_splits(config):
        manifest = tokenize(config, split)
        tokens = f"{manifest.num_samples:,} x {length(config.tokenizer.patch_nums)}"
        say(f"tokens {split}: {tokens} ({getattr(config.data, f'tokens_{split}')})")


def train_runs(study: Study) -> None:
    """Train every run that has not ended, smallest model first.

    With `study.parallel` that many at a time, longest first: no process waits at the end while the
    longest run trains. A run that diverges does not stop the others.
    """
    from var_scale.jobs.lanes import train_together
    from var_scale.jobs.local import train_here
    from var_scale.study.advice import flops_of
    from var_scale.study.results import update_summary

    runs, jobs = study.runs(), list[tuple[Config, RunFolder, str]]()
    for number, (config, run) in enumerate(runs, 1):
        state, count = run.status()["state"], f"({number}/{len(runs)})"
        if state in ENDED:
            say(f"run {config.name}: {state} {count}")
            continue
        jobs.append((config, run, f"train {config.name} {count}"))

    def summarise() -> None:
        if study.config.log.wandb != "disabled" and not study.ended():
            update_summary(study)

    if study.spec.parallel > 1:
        jobs.sort(key=lambda job: -flops_of(job[0]))
        train_together(jobs, study.spec.parallel, summarise)
        return
    for config, run, label in jobs:
        create_run(config, run.path)
        train_here(config, run, label, may_diverge=True)
        summarise()


def measure_samples(study: Study) -> None:
    """Sample and measure a run of every size, if the study asks for it and these runs were not
    measured before. What prevents it, such as images or checkpoints that no longer exist, is
    printed and does not prevent the report."""
    if not study.spec.quality_samples:
        return
    from var_scale.model.sampling import Settings
    from var_scale.study.sample_quality import stamp, study_quality

    spec, path = study.spec, study.report / QUALITY_NAME
    settings = Settings(spec.cfg, spec.top_k, spec.top_p)
    measured = read_json(path, "quality of samples").get("stamp") if path.exists() else None
    if measured == stamp(study, spec.quality_samples, settings):
        return
    try:
        study_quality(study, spec.quality_samples, None, None, settings, batch=64)
    except UserError as error:
        say(f"samples are not measured: {error}")


def make_report(study: Study, formats: Sequence[str] = ("png",)) -> StudyResult:
    """Gate, fit, hold-out test, report with figures in `formats`, samples of the largest model."""
    from var_scale.study.results import build_report

    require_matching_runs(study)
    return build_report(study, formats)


def mark_complete(study: Study) -> None:
    """Record what the finished report belongs to, and its files (see `Study.complete`)."""
    files = sorted(path.name for path in study.report.iterdir() if path.is_file())
    write_json(
        study.report / "complete.json",
        {"identity": study.identity(), "data_hash": study.data_hash(), "files": files},
    )
