"""Creating a run folder. No torch here."""

from __future__ import annotations

from os.path import abspath
from pathlib import Path

from var_scale.config.load import config_hash, difference, load, write_config
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.run_folder import RunFolder


def create_run(config: Config, folder: Path) -> RunFolder:
    """Create the folder of a run with its config, or check that an existing one is of this run.

    Raises:
        UserError: the folder holds a run with another config.
    """
    run = RunFolder(folder)
    require_same_run(config, run)
    write_config(_absolute(config), run.config)
    if not (folder / "status.json").exists():
        run.set_status("created")
    return run


def _absolute(config: Config) -> Config:
    """The config with absolute paths of data and tokenizer: a run folder may be used from any
    working folder."""

    def place(given: str | None) -> str | None:
        return given if given is None or "://" in given else abspath(given)

    names = ("images_train", "images_val", "tokens_train", "tokens_val")
    data = {name: place(getattr(config.data, name)) for name in names}
    weights = {"weights": place(config.tokenizer.weights)}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "tokenizer": config.tokenizer.model_copy(update=weights),
        }
    )


def require_same_run(config: Config, run: RunFolder) -> None:
    """The folder, if it holds a run that has made a step, holds the run of this config.

    Raises:
        UserError: it holds a run with another config (code `train.run-other-config`).
    """
    if run.config.exists() and run.has_steps():
        existing = load(str(run.config))
        if config_hash(existing) != config_hash(config):
            raise UserError(
                f"{run.path}: holds a run with another config ({difference(existing, config)}); "
                "choose another folder or name, or remove it",
                code="train.run-other-config",
            )
