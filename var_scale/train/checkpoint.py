"""The portable checkpoint (contract 6): float32 weights and moments by official name, whatever engine wrote them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import var_scale
from var_scale.errors import UserError
from var_scale.files import disk_errors, read_json, remove_tree, sha256_file, write_json
from var_scale.train.engine.base import MOMENT_KEYS, Engine, Moments
from var_scale.train.world import World

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])

    def weights(self) -> dict[str, torch.Tensor]:
        """Float32 weights by official name, verified."""
        return self._load(WEIGHTS)

    def load_into(self, var: torch.nn.Module) -> None:
        """Set the weights of `var`; its buffers are not in a checkpoint. UserError when the names differ."""
        weights = self.weights()
        if {name for name, _ in var.named_parameters()} != set(weights):
            raise UserError(f"{self.folder}: the checkpoint does not fit the run's config; restore config.yaml")
        var.load_state_dict(weights, strict=False)

    def moments(self) -> Moments:
        """AdamW's moments by official name, verified."""
        flat = self._load(MOMENTS)
        return {key: {name.removeprefix(f"{key}/"): t for name, t in flat.items() if name.startswith(f"{key}/")} for key in MOMENT_KEYS}

    def _load(self, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.exists() or sha256_file(path) != self.state["files"][name]:
            raise UserError(f"{path}: missing or damaged (checksum differs); remove the folder {self.folder} to continue from an older one")
        return load_file(path)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first; half-written ones have another name and are not seen."""
    found = [Checkpoint(p, read_json(p / STATE, "checkpoint state")) for p in folder.glob("step-*") if (p / STATE).exists()]
    return sorted(found, key=lambda c: c.step)


def save_checkpoint(folder: Path, engine: Engine, world: World, state: dict[str, Any], keep: int) -> None:
    """Gather on every rank, write on rank 0: temporary folder, synced, renamed; then drop all but the newest `keep`."""
    weights, moments = engine.gather()
    if world.main:
        write_checkpoint(folder, weights, moments, state, keep)
    world.barrier()


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], moments: Moments, state: dict[str, Any], keep: int) -> None:
    """Write one checkpoint as `folder/step-XXXXXXXX`."""
    final = folder / f"step-{state['step']:08d}"
    temporary = folder / f".{final.name}.tmp"
    with disk_errors(folder):
        for left_over in folder.glob(".step-*.tmp"):  # of a life that was killed while it saved
            remove_tree(left_over)
        temporary.mkdir(parents=True)
        try:
            files = {}
            flat = {f"{key}/{name}": t.contiguous() for key in MOMENT_KEYS for name, t in moments[key].items()}
            for name, tensors in ((WEIGHTS, weights), (MOMENTS, flat)):
                _save_synced({k: t.contiguous() for k, t in tensors.items()}, temporary / name)
                files[name] = sha256_file(temporary / name)
            versions = {"var_scale": var_scale.__version__, "torch": torch.__version__}
            write_json(temporary / STATE, {"format": 1, **state, "files": files, "versions": versions, "time": time.time()})
            remove_tree(final)
            os.replace(temporary, final)
        except BaseException:
            remove_tree(temporary)
            raise
    for old in checkpoints(folder)[:-keep]:
        remove_tree(old.folder)


def _save_synced(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors to disk, with a full disk reported as such."""
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors raises its own type for I/O errors
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(28, "No space left on device") from None
        raise
    with open(path, "rb") as file:
        os.fsync(file.fileno())
