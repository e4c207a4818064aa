"""The config that a run folder holds, with the places of its files on this machine. No torch
here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.files import require_exists
from var_scale.run_folder import RunFolder


def saved_config(run: Path) -> Config:
    """The config of a run folder, for everything that reads a run which may have been moved or
    copied together with its study.

    Raises:
        UserError: the folder does not exist (code `file.missing`) or is not a run folder (code
            `train.no-run`).
    """
    file = RunFolder(run).config
    if not file.exists():
        require_exists(run)
        raise UserError(f"{run}: is not a run folder (no config.yaml)", code="train.no-run")
    config = load(str(file))
    folder = run.resolve().parent
    names = ("images_train", "images_val", "tokens_train", "tokens_val")
    data = {name: _here(folder, getattr(config.data, name)) for name in names}
    weights = _here(folder, config.tokenizer.weights)
    changes: dict[str, Any] = {
        "data": config.data.model_copy(update=data),
        "tokenizer": config.tokenizer.model_copy(update={"weights": weights}),
    }
    return config.model_copy(update=changes)


def _here(study: Path, saved: str | None) -> str | None:
    """The present place of a file or folder that a run's config names.

    A study saves absolute paths such as OLD/STUDY/tokens/val. The study's own folder comes first:
    a copy of a study must not depend on the original, which may have changed. A renamed study has
    another name than the path, so there the path comes first.

    Args:
        study: the present folder of the study, in which the run is.
    """
    if saved is None or "://" in saved:
        return saved
    old = Path(saved)
    copied, renamed = (
        place / Path(*old.parts[-n:]) for place, n in ((study.parent, 3), (study, 2))
    )
    places = [copied, old, renamed] if len(old.parts) > 3 else [old]
    return next((str(place) for place in places if place.exists()), saved)
