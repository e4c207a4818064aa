"""Single parts of a study that commands run: generated data, tokens, a tokenizer, one run."""

from __future__ import annotations

from pathlib import Path

from var_scale.config.load import run_config
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.progress import say
from var_scale.run_folder import tokenizer_file
from var_scale.study.checks import (
    check_data_settings,
    check_run_here,
    require_untrained_tokenizer,
)
from var_scale.study.data_checks import require_matching_classes
from var_scale.study.stages import (
    make_shapes,
    tokenize_stage,
    train_tokenizer_stage,
)
from var_scale.study.study import Study
from var_scale.study.token_sets import make_tokens


def generate_data(config: Config, runs: Path) -> None:
    """Write the embedded data set of a config as shards.

    Raises:
        UserError: the config has no embedded set (code `study.nothing-to-generate`), or one that
            does not fit its tokenizer.
    """
    if config.data.teacher:
        study = Study(config, runs)
        check_data_settings(study)
        make_tokens(study)
    elif config.data.shapes:
        make_shapes(config if config.data.images_train else Study(config, runs).with_files())
    else:
        raise UserError(
            f"{config.name}: has neither data.shapes nor data.teacher; include data/shapes32 or "
            "data/teacher",
            code="study.nothing-to-generate",
        )


def tokenize_images(config: Config, runs: Path) -> None:
    """Encode the image shards of a study or of a config as token shards."""
    study = Study(config, runs) if config.study else None
    tokenize_stage(study.with_files() if study else with_tokenizer(config, runs))


def train_tokenizer_of(config: Config, runs: Path, folder: Path | None, processes: int) -> None:
    """Train the tokenizer of a config in `folder`, by default RUNS/NAME/tokenizer."""
    require_untrained_tokenizer(config, processes)
    require_matching_classes(config)
    if config.study:
        config = Study(config, runs).with_files()
    if config.data.shapes and config.data.images_train:
        make_shapes(config)
    train_tokenizer_stage(config, folder or runs / config.name / "tokenizer", processes)


def with_tokenizer(config: Config, runs: Path) -> Config:
    """The config with the tokenizer that `tokenizer train` trained for it, unless it names one."""
    found = tokenizer_file(runs / config.name / "tokenizer")
    if config.tokenizer.weights or not found.exists():
        return config
    say(f"tokenizer: {found}")
    tokenizer = config.tokenizer.model_copy(update={"weights": str(found)})
    return config.model_copy(update={"tokenizer": tokenizer})


def find_run(config: Config, source: str, runs: Path, depth: int | None) -> tuple[Config, Path]:
    """Config and folder of one run, checked: of one size of a study, or of a config by itself.

    Args:
        source: the file or preset of the config. A config without a name of its own gets its stem:
            model/d16 is the run d16.
        depth: the size, where the config has a study. The run then uses the study's data and
            tokenizer.

    Raises:
        UserError: the study has no such size (code `study.run-unknown`), or the run cannot start
            here (see `check_run_here`).
    """
    if config.study:
        study = Study(config, runs)
        if depth not in study.spec.depths:
            sizes = ", ".join(map(str, study.spec.depths))
            raise UserError(
                f"--depth: is {depth}; give a size of this study, one of {sizes}",
                code="study.run-unknown",
            )
        config = run_config(study.with_files(), depth, config.train.seed)
        folder = study.folder / config.name
    else:
        name = config.name if config.name != "run" else Path(source).stem
        folder, config = runs / "single" / name, with_tokenizer(config, runs)
    check_run_here(config)
    return config, folder


def config_of_size(config: Config, depth: int | None) -> Config:
    """The config of one size of a study; a config without a study is returned as it is.

    Raises:
        UserError: the study is given without a size (code `study.run-unknown`).
    """
    if not config.study:
        return config
    if depth is None:
        raise UserError(
            f"--depth: give a size of this study, such as {config.study.depths[0]}",
            code="study.run-unknown",
        )
    return run_config(config, depth, config.train.seed)


def train_run(config: Config, folder: Path) -> str:
    """Train one run on this machine, or continue it; returns a line with its final losses."""
    from var_scale.jobs.local import train_here
    from var_scale.train.create import create_run

    run = create_run(config, folder)
    if run.status()["state"] == "complete":
        return f"{folder}: this run is complete; there is nothing to do"
    train_here(config, run, f"train {config.name}")
    final = [row for row in run.read_metrics() if row["kind"] == "eval"][-1]
    return (
        f"{folder}: validation loss {final['loss_avg']:.4f} (all scales), "
        f"{final['loss_last']:.4f} (last scale)"
    )
