"""The portable checkpoint (contract 6): float32 weights and moments by official name, whatever engine wrote them.

A folder `step-XXXXXXXX` holds `part-RRRRR.safetensors` of every rank that wrote, `state.json`, and `index.json`, which says where each run
of consecutive elements of each tensor lies. So any engine at any world size reads what it needs, and no rank holds all of the optimiser's
state.
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

from var_scale.errors import UserError
from var_scale.files import read_json, sha256_file
from var_scale.train.engine.base import WEIGHT, Engine

STATE, INDEX, FORMAT = "state.json", "index.json", 2
Run = tuple[int, int, str]  # start, count, file


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
        return {kind: {name: tuple(entry["shape"]) for name, entry in names.items()} for kind, names in self._index.items()}

    @cached_property
    def _index(self) -> dict[str, dict[str, dict[str, Any]]]:
        if not (self.folder / INDEX).exists():
            raise UserError(damaged_message(str(self.folder / INDEX), self.folder))
        index = read_json(self.folder / INDEX, "checkpoint index")
        for names in index.values():
            for name, entry in names.items():
                covered = 0
                for start, count, _ in entry["runs"]:
                    if start != covered:
                        raise UserError(f"{self.folder}: {name} has a gap at element {covered}; remove the folder to use an older one")
                    covered += count
                if covered != math.prod(entry["shape"]):
                    raise UserError(f"{self.folder}: {name} is not whole; remove the folder to use an older one")
        return index

    def verify(self, rank: int = 0, size: int = 1) -> str:
        """Compare the checksums of this rank's share of the files; the first damaged file, or nothing."""
        for name in sorted(self.state["files"])[rank::size]:
            path = self.folder / name
            if not path.exists() or sha256_file(path) != self.state["files"][name]:
                return str(path)
        return ""

    def check(self) -> None:
        """UserError when any file is missing or damaged."""
        if damaged := self.verify():
            raise UserError(damaged_message(damaged, self.folder))

    def read(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` (n,) with the elements from `start` of a flattened tensor."""
        runs: list[Run] = self._index[kind][name]["runs"]
        at, end = start, start + into.numel()
        place = bisect_right(runs, at, key=lambda run: run[0]) - 1
        while at < end:
            first, count, file = runs[place]
            take = min(end, first + count) - at
            part = self._open(file).get_slice(f"{kind}/{name}@{first}")[at - first : at - first + take]
            into[at - start : at - start + take].copy_(part)
            at, place = at + take, place + 1

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, "pt")
            except (OSError, SafetensorError):
                raise UserError(damaged_message(file, self.folder)) from None
        return self._files[file]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def tensors(self, kind: str = WEIGHT) -> dict[str, torch.Tensor]:
        """All tensors of a kind, whole, float32."""
        return {name: self._whole(kind, name) for name in self.shapes[kind]}

    def _whole(self, kind: str, name: str) -> torch.Tensor:
        shape = self.shapes[kind][name]
        flat = torch.empty(math.prod(shape))
        self.read(kind, name, 0, flat)
        return flat.view(shape)

    def load_into(self, var: torch.nn.Module, kind: str = WEIGHT) -> None:
        """Set the weights of `var`; its buffers are not in a checkpoint. UserError when names or shapes differ."""
        if {name: tuple(p.shape) for name, p in var.named_parameters()} != self.shapes[kind]:
            raise UserError(f"{self.folder}: the checkpoint does not fit the run's config; restore config.yaml")
        with torch.no_grad():
            for name, p in var.named_parameters():
                p.copy_(self._whole(kind, name))

    def load_weights(self, engine: Engine) -> None:
        """Set the master weights of a running engine."""
        with torch.no_grad():
            for piece in engine.pieces():
                if piece.kind == WEIGHT:
                    self.read(WEIGHT, piece.name, piece.start, piece.tensor)
        engine.publish()

    def load_state(self, engine: Engine) -> None:
        """Set the optimiser state of an engine whose weights are already there; every rank reads only what it holds."""
        engine.create_state(self.step - int(self.state["skipped_steps"]))
        for piece in engine.pieces():
            if piece.kind != WEIGHT and piece.kind in self.shapes:
                self.read(piece.kind, piece.name, piece.start, piece.tensor)
        engine.load_extra_state(self.state)


def damaged_message(file: str, folder: Path) -> str:
    """What to tell about a damaged file."""
    older = [c for c in checkpoints(folder.parent) if c.folder.name < folder.name]
    then = f"continue from step {older[-1].step}" if older else "begin again; there is no older one"
    return f"{file}: missing or damaged (checksum differs); remove the folder {folder} to {then}"


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first; half-written ones have another name and are not seen."""
    found = [Checkpoint(p, read_json(p / STATE, "checkpoint state")) for p in folder.glob("step-*") if (p / STATE).exists()]
    for checkpoint in found:
        if checkpoint.state.get("format") != FORMAT:
            raise UserError(f"{checkpoint.folder}: was written by another version of var-scale; remove the run or use that version")
    return sorted(found, key=lambda c: c.step)


def merge_indexes(parts: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """One index of the ranks' own: kind, name, shape and sorted runs."""
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
