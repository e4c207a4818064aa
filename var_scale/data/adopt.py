"""WebDataset tars made by others: adopting them, and checking shards against their manifest."""

from __future__ import annotations

from pathlib import Path

from var_scale.data.index_urls import index_urls
from var_scale.data.indexing import index_folder
from var_scale.data.manifest import Manifest
from var_scale.data.verify import verify_folder
from var_scale.errors import UserError
from var_scale.progress import say


def adopt_tars(
    source: str,
    out: Path | None,
    *,
    split: str,
    num_classes: int | None,
    class_names: list[str] | None,
    label_key: str | None,
) -> tuple[Path, Manifest]:
    """Index the tars of a folder, where the index is written, or at URLs, indexed in `out`.

    Returns:
        The folder that can be read as shards, and its manifest.

    Raises:
        UserError: `out` is missing for URLs or given for a folder (code `data.index-folder`).
    """
    if "://" in source:
        if out is None:
            raise UserError(
                "--out: give a folder for the index and the manifest of tars at URLs",
                code="data.index-folder",
            )
        return out, index_urls(source, out, split, num_classes, class_names, label_key)
    if out:
        raise UserError(
            f"--out {out}: is only for tars at URLs; the index of a folder is written into it",
            code="data.index-folder",
        )
    folder = Path(source)
    return folder, index_folder(
        folder, "image", split, num_classes, class_names=class_names, label_key=label_key
    )


def require_sound(folder: Path, drop_bad: bool) -> None:
    """Verify shards and print every problem.

    Args:
        drop_bad: remove shards with a problem from the manifest.

    Raises:
        UserError: there are problems and `drop_bad` is not set (code `data.shards-damaged`).
    """
    problems = verify_folder(folder, drop_bad)
    for problem in problems:
        say(problem)
    if problems and not drop_bad:
        raise UserError(
            f"{folder}: {len(problems)} problem(s); rewrite the shards named above, or leave them "
            "out with --drop-bad",
            code="data.shards-damaged",
        )
    if problems:
        say(
            f"{folder}: the manifest now lists only the sound shards; runs that began with the "
            "other shards refuse it"
        )
