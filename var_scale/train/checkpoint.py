"""The portable checkpoint: float32 weights and moments by official name, whatever engine wrote
them.

A folder `step-XXXXXXXX` holds `part-RRRRR.safetensors` of every rank that wrote, `state.json`, and
`index.json`, which lists where each run of consecutive elements of each tensor is stored. Any
engine at any world size therefore reads only what it needs, and no rank holds the complete
optimiser state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from var_scale.config.schema import Config
from var_scale.errors import UserError
from var_scale.files import LFS_POINTER, is_lfs_pointer, read_json, sha256_file
from var_scale.model.official import require_finite
from var_scale.run_folder import RunFolder
from var_scale.train.engine.base import WEIGHT, Engine
from var_scale.train.saved_config import saved_config

STATE, INDEX, FORMAT = "state.json", "index.json", 2
OLD_KEYS = {
    "passed_over": "skipped_samples",
    "times_back": "rollbacks",
    "evaluation_owed": "evaluation_pending",
}
"""Keys of state.json in older versions."""
Run = tuple[int, int, str]
"""Consecutive elements of a flattened tensor in one file: start, count, file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    @cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shape of every tensor, by kind (weight, exp_avg, exp_avg_sq, ema) and official name."""
        return {
            kind: {name: tuple(entry["shape"]) for name, entry in names.items()}
            for kind, names in self._index.items()
        }

    @cached_property
    def _index(self) -> dict[str, dict[str, dict[str, Any]]]:
        """index.json. The runs of elements of every tensor must cover it without a gap."""
        if not (self.folder / INDEX).exists():
            raise UserError(
                damaged_message(str(self.folder / INDEX), self.folder),
                code="train.checkpoint-damaged",
            )
        index = read_json(self.folder / INDEX, "checkpoint index")
        for names in index.values():
            for name, entry in names.items():
                covered = 0
                for start, count, _ in entry["runs"]:
                    if start != covered:
                        raise UserError(
                            f"{self.folder}: {name} has a gap at element {covered}; remove the "
                            "folder to use an older checkpoint",
                            code="train.checkpoint-damaged",
                        )
                    covered += count
                if covered != math.prod(entry["shape"]):
                    raise UserError(
                        f"{self.folder}: {name} is incomplete; remove the folder to use an older "
                        "checkpoint",
                        code="train.checkpoint-damaged",
                    )
        return index

    def verify(self, rank: int = 0, size: int = 1) -> str:
        """Compare the checksums of this rank's share of the files; returns the first damaged file,
        or an empty string."""
        for name in sorted(self.state["files"])[rank::size]:
            path = self.folder / name
            if not path.exists() or sha256_file(path) != self.state["files"][name]:
                return str(path)
        return ""

    def check(self) -> None:
        """Compare the checksums of all files.

        Raises:
            UserError: a file is missing or damaged.
        """
        if damaged := self.verify():
            raise UserError(damaged_message(damaged, self.folder), code="train.checkpoint-damaged")

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` (n,) with the elements from `start` of a flattened tensor."""
        runs: list[Run] = self._index[kind][name]["runs"]
        at, end = start, start + into.numel()
        place = bisect_right(runs, at, key=lambda run: run[0]) - 1  # the run that holds `at`
        while at < end:
            first, count, file = runs[place]
            take = min(end, first + count) - at
            part = self._open(file).get_slice(f"{kind}/{name}@{first}")[
                at - first : at - first + take
            ]
            into[at - start : at - start + take].copy_(part)
            at, place = at + take, place + 1

    def _open(self, file: str) -> Any:
        """A file of the checkpoint, which stays open for the next read."""
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, "pt")
            except (OSError, SafetensorError):
                raise UserError(
                    damaged_message(file, self.folder), code="train.checkpoint-damaged"
                ) from None
        return self._files[file]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def tensors(self, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
        """All complete tensors of a kind, float32."""
        return {name: self._whole(kind, name) for name in self.shapes[kind]}

    def _whole(self, kind: str, name: str) -> torch.Tensor:
        shape = self.shapes[kind][name]
        flat = torch.empty(math.prod(shape))
        self.read(kind, name, 0, flat)
        return flat.view(shape)

    def load_into(self, var: torch.nn.Module, kind: str = WEIGHT) -> None:
        """Set the weights of `var`; a checkpoint has no buffers.

        Raises:
            UserError: names or shapes differ, or a weight is not finite.
        """
        if {name: tuple(p.shape) for name, p in var.named_parameters()} != self.shapes[kind]:
            raise UserError(
                f"{self.folder}: the checkpoint does not fit the config of the run; restore "
                "config.yaml",
                code="train.checkpoint-other-model",
            )
        with torch.no_grad():
            for name, p in var.named_parameters():
                p.copy_(self._whole(kind, name))
        require_finite(dict(var.named_parameters()), self.folder)

    def load_weights(self, engine: Engine) -> None:
        """Set the master weights of a running engine."""
        with torch.no_grad():
            for piece in engine.pieces():
                if piece.kind == WEIGHT:
                    self.read(WEIGHT, piece.name, piece.start, piece.tensor)
        engine.publish()

    def load_state(self, engine: Engine) -> None:
        """Set the optimiser state of an engine whose weights are already set; every rank reads only
        what it stores."""
        engine.create_state(self.step - int(self.state["skipped_steps"]))
        for piece in engine.pieces():
            if piece.kind != WEIGHT and piece.kind in self.shapes:
                self.read(piece.kind, piece.name, piece.start, piece.tensor)
        engine.load_extra_state(self.state)


def damaged_message(file: str, folder: Path) -> str:
    """A message about a damaged file, with the step that training can continue from."""
    path = folder / Path(file).name
    if is_lfs_pointer(path):
        return f"{path}: {LFS_POINTER}"
    older = [c for c in checkpoints(folder.parent) if c.folder.name < folder.name]
    then = f"continue from step {older[-1].step}" if older else "start again; no older one exists"
    return f"{file}: missing or damaged (checksum differs); remove the folder {folder} to {then}"


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first. Unfinished ones have another name and are not found."""
    found = [
        Checkpoint(path, _state(path / STATE))
        for path in folder.glob("step-*")
        if (path / STATE).exists()
    ]
    for checkpoint in found:
        if checkpoint.state.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint.folder}: was written by another version of var-scale; remove the run "
                "or use that version",
                code="train.checkpoint-version",
            )
    return sorted(found, key=lambda c: c.step)


def _state(path: Path) -> dict[str, Any]:
    state = read_json(path, "checkpoint state")
    return {OLD_KEYS.get(key, key): value for key, value in state.items()}


def newest_checkpoint(folder: Path, step: int | None = None) -> tuple[Config, Checkpoint]:
    """Config (`saved_config`) and newest complete checkpoint of a run, or the one of `step`.

    Raises:
        UserError: no run folder, no checkpoint, or none of that step.
    """
    run = RunFolder(folder)
    config = saved_config(folder)
    found = checkpoints(run.checkpoints)
    if not found:
        raise UserError(
            f"{folder}: has no complete checkpoint; train it first", code="train.no-checkpoint"
        )
    chosen = [c for c in found if step in (None, c.step)]
    if not chosen:
        steps = ", ".join(str(c.step) for c in found)
        raise UserError(
            f"{folder}: has no checkpoint of step {step}; the existing ones are {steps}",
            code="train.no-checkpoint",
        )
    return config, chosen[-1]


def merge_indexes(parts: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Merge the indexes of the ranks into one: kind, name, shape and sorted runs."""
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    shapes: dict[tuple[str, str], list[int]] = {}
    for part in parts:
        for kind, name, shape, start, count in part["pieces"]:
            runs[kind, name].append((start, count, part["file"]))
            shapes[kind, name] = shape
    index: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (kind, name), found in runs.items():
        index[kind][name] = {"shape": shapes[kind, name], "runs": sorted(found)}
    return index
