"""The runs of any source: folders, tables, wandb, files of the official trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from var_scale.errors import UserError
from var_scale.records.cells import listed
from var_scale.records.foreign import IMAGENET
from var_scale.records.mapped_csv import read_mapped_csv
from var_scale.records.official_log import (
    output_folder,
    read_official_log,
    read_official_tensorboard,
)
from var_scale.records.record import RunRecord, by_size, read_run, read_study
from var_scale.records.runs_csv import read_runs_csv
from var_scale.records.wandb_runs import read_wandb_project


def read_records(
    source: str,
    mapping: dict[str, str] | None = None,
    train_samples: int = IMAGENET,
    train_values: bool = False,
) -> list[RunRecord]:
    """The runs of one source.

    Args:
        source: a run folder, a study folder, `wandb:ENTITY/PROJECT[/GROUP]`, the official trainer's
            output folder, log.txt or TensorBoard folder, a CSV of records, or with `mapping` any
            CSV.
        mapping: field of a record -> column of the CSV.
        train_samples: training images of official runs.
        train_values: whether the numbers of a mapped CSV are of the training data, and those of the
            official console are read.

    Raises:
        UserError: code `records.source-missing`, `records.source-unknown` or
            `records.wandb-offline`, or as the reader of the source raises it.
    """
    if source.startswith("wandb:"):
        return read_wandb_project(source.removeprefix("wandb:"))
    path = Path(source)
    if path.suffix.lower() == ".csv":
        if not mapping:
            return read_runs_csv(path)
        split = "training" if train_values else "validation"
        return [replace(run, split=split) for run in read_mapped_csv(path, mapping)]
    if path.is_file() and path.suffix != ".wandb":
        return [read_official_log(path, train_samples, train_values)]
    if not path.exists():
        raise UserError(
            f"{source}: this does not exist; give a folder or file of runs, or "
            "wandb:ENTITY/PROJECT",
            code="records.source-missing",
        )
    if (path / "run.json").exists():
        return [read_run(path)]
    if any(path.glob("*/run.json")):
        return read_study(path)
    if path.is_file() or any(path.glob("**/*.wandb")):
        # wandb offers no reader for its offline files, and metrics.jsonl has the same numbers.
        raise UserError(
            f"{source}: wandb's files of offline runs are not read; give the run folder, whose "
            "metrics.jsonl has the same numbers, or upload them by `wandb sync` and give "
            "wandb:ENTITY/PROJECT",
            code="records.wandb-offline",
        )
    if (path / "log.txt").exists():
        return [read_official_log(path / "log.txt", train_samples)]
    if any(path.glob("**/events.out.tfevents.*")):
        return [read_official_tensorboard(path, train_samples)]
    raise UserError(
        f"{source}: it contains no runs; give a run or study folder, or the output folder of the "
        "official trainer",
        code="records.source-unknown",
    )


def read_all(
    sources: Sequence[str],
    mapping: dict[str, str] | None = None,
    train_samples: int = IMAGENET,
    train_values: bool = False,
    say: Callable[[str], None] = print,
) -> list[RunRecord]:
    """The runs of several sources, smallest first.

    Official runs of one name get as many parent folders as make their names distinct.

    Args:
        say: takes a line about two official folders with the same numbers, which are one run.

    Raises:
        UserError: code `records.run-twice` for a run that two sources give with different numbers,
            or as `read_records` raises it.
    """
    found: dict[str, list[_Found]] = {}
    for source in sources:
        for record in read_records(source, mapping, train_samples, train_values):
            place = _official_place(source, record.name)
            same = found.setdefault(record.name, [])
            # Values that are nan differ from themselves, their text does not.
            known = next((one for one in same if repr(one.record) == repr(record)), None)
            if not known:
                same.append(_Found(source, place, record))
            elif known.place != place and known.place and place:
                say(f"{known.source} and {source} have the same numbers, so they are one run")
    return by_size(record for same in found.values() for record in _renamed(same, set(found)))


class _Found(NamedTuple):
    """A run, its source, and for official runs the path that names it."""

    source: str
    place: Path | None
    record: RunRecord


def _official_place(source: str, name: str) -> Path | None:
    """The folder that names an official run, or the file where its name ends the run's; None for
    other sources."""
    path = Path(source)
    if source.startswith("wandb:") or path.suffix.lower() == ".csv":
        return None
    if path.is_dir() and ((path / "run.json").exists() or any(path.glob("*/run.json"))):
        return None
    if path.is_file() and name.endswith(f"-{path.stem}"):
        return path.resolve().with_suffix("")
    return output_folder(path)


def _renamed(runs: list[_Found], taken: set[str]) -> list[RunRecord]:
    """Runs of one name with distinct names: of their folders and the parents that are needed."""
    if len(runs) == 1:
        return [runs[0].record]
    places = [run.place for run in runs if run.place]
    if len(places) == len(runs):
        for count in range(2, max(len(place.parts) for place in places) + 1):
            names = [
                _longer(run.record.name, place, count)
                for run, place in zip(runs, places, strict=True)
            ]
            if len(set(names)) == len(names) and not taken & set(names):
                taken.update(names)
                return [
                    replace(run.record, name=name) for run, name in zip(runs, names, strict=True)
                ]
    first, second, *_ = runs
    name = listed([first.record.name])
    if first.source == second.source:
        raise UserError(
            f"{first.source}: run {name} is in it twice, with different numbers; leave one of them "
            "out or rename it",
            code="records.run-twice",
        )
    raise UserError(
        f"run {name} is in {first.source} and, with other numbers, in {second.source}; leave one "
        "of them out",
        code="records.run-twice",
    )


def _longer(name: str, place: Path, count: int) -> str:
    """The name of a run with the last `count` parts of its place instead of the last, or after a
    name that its user chose."""
    parts = "-".join(place.parts[1:][-count:])
    ends = name.endswith(f"-{place.name}")
    return f"{name.removesuffix(place.name)}{parts}" if ends else f"{name}-{parts}"
