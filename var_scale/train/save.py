"""Writing checkpoints: every rank its own part, in the background, while training goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

import var_scale
from var_scale.errors import UserError
from var_scale.files import disk_errors, read_json, remove_tree, write_json
from var_scale.train.checkpoint import FORMAT, INDEX, STATE, checkpoints, merge_indexes
from var_scale.train.engine.base import Engine

OTHERS_SECONDS = 1800.0  # how long rank 0 waits for the parts of the others
BLOCK = 1 << 24


class CheckpointWriter:
    """One rank's writer. `save` copies what the rank owns to host memory and returns; a thread writes it.

    The parts go to `.step-N.LIFE.tmp`, each with its checksums; when all are there, rank 0 writes state.json, syncs and renames the folder.
    So a kill at any moment leaves a complete checkpoint or none. One save at a time: host memory is one copy of the rank's own part.
    """

    def __init__(self, folder: Path, rank: int, size: int, life: str, keep: int, keep_steps: Collection[int] = ()):
        """`life` is the same on all ranks and differs between starts; the newest `keep` checkpoints stay, and those at `keep_steps`."""
        self.folder, self.rank, self.size, self.life = folder, rank, size, life
        self.keep, self.keep_steps = keep, keep_steps
        self.buffer: torch.Tensor | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.stall_seconds = 0.0
        if rank == 0:
            for left_over in folder.glob(".step-*.tmp"):  # of a life that was killed while it saved
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, engine: Engine, state: dict[str, Any], beat: Callable[[], None] = lambda: None) -> None:
        """Begin to write the engine's weights and moments as `step-XXXXXXXX`; waits for an earlier save first. Every rank calls it."""
        began = time.monotonic()
        self.wait(beat)
        pieces, values = self._snapshot(engine)
        copied = None
        if values.is_pinned():
            copied = torch.cuda.Event()
            copied.record()
        self.thread = threading.Thread(target=self._write, args=(pieces, values, copied, state | engine.extra_state()), daemon=True)
        self.thread.start()
        self.stall_seconds += time.monotonic() - began

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Until the save in flight is on disk; raises what went wrong in it. `beat` is called while it waits."""
        while self.thread:
            self.thread.join(1.0)
            beat()
            if not self.thread.is_alive():
                self.thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self.error:
            raise self.error

    def _snapshot(self, engine: Engine) -> tuple[list[list[Any]], torch.Tensor]:
        """What this rank owns, copied one after the other: (kind, name, shape, start, count) of each run, and the elements."""
        owned = []
        for piece in engine.pieces():
            index, copies = piece.copy
            n = piece.tensor.numel()
            first, end = index * n // copies, (index + 1) * n // copies
            if end > first:
                entry = [piece.kind, piece.name, list(piece.shape), piece.start + first, end - first]
                owned.append((entry, piece.tensor[first:end].detach()))
        total = sum(tensor.numel() for _, tensor in owned)
        if self.buffer is None or self.buffer.numel() != total:
            self.buffer = torch.empty(total, pin_memory=any(tensor.is_cuda for _, tensor in owned))
        place = 0
        for _, tensor in owned:
            self.buffer[place : place + tensor.numel()].copy_(tensor, non_blocking=True)
            place += tensor.numel()
        return [entry for entry, _ in owned], self.buffer

    def _write(self, pieces: list[list[Any]], values: torch.Tensor, copied: Any, state: dict[str, Any]) -> None:
        """The thread: this rank's part, and on rank 0 the rest."""
        temporary = self.folder / f".step-{state['step']:08d}.{self.life}.tmp"
        try:
            if copied is not None:
                copied.synchronize()
            with disk_errors(self.folder):
                temporary.mkdir(parents=True, exist_ok=True)
                name = f"part-{self.rank:05d}"
                digest = write_part(temporary / f"{name}.safetensors", pieces, values)
                write_json(temporary / f"{name}.json", {"file": f"{name}.safetensors", "sha256": digest, "pieces": pieces})
                if self.rank == 0:
                    self._finish(temporary, state)
        except BaseException as error:  # told at the next look; the older checkpoints stay
            self.error = error
            with contextlib.suppress(OSError):
                if self.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    (temporary / f"part-{self.rank:05d}.safetensors").unlink(missing_ok=True)
                    (temporary / f"part-{self.rank:05d}.failed").touch()

    def _finish(self, temporary: Path, state: dict[str, Any]) -> None:
        """Wait for the parts of all ranks, describe them, give the folder its name, drop old ones."""
        names = [temporary / f"part-{rank:05d}.json" for rank in range(self.size)]
        deadline = time.monotonic() + OTHERS_SECONDS
        while missing := [path for path in names if not path.exists()]:
            if failed := sorted(path.stem for path in temporary.glob("part-*.failed")):
                raise UserError(f"{temporary}: {failed[0]} could not be written by its rank; see its message")
            if time.monotonic() > deadline:
                raise UserError(f"{temporary}: {missing[0].stem} was not written within {OTHERS_SECONDS:.0f} s by its rank")
            time.sleep(0.02)
        parts = [read_json(path, "part of a checkpoint") for path in names]
        write_json(temporary / INDEX, merge_indexes(parts))
        versions = {"var_scale": var_scale.__version__, "torch": torch.__version__}
        files = {part["file"]: part["sha256"] for part in parts}
        write_json(temporary / STATE, {"format": FORMAT, **state, "files": files, "versions": versions, "time": time.time()})
        for path in names:
            path.unlink()
        sync_folder(temporary)
        final = self.folder / f"step-{state['step']:08d}"
        self._remove(final)
        os.replace(temporary, final)
        sync_folder(self.folder)
        old = [c for c in checkpoints(self.folder) if c.step not in self.keep_steps]
        for checkpoint in old[: -self.keep]:
            self._remove(checkpoint.folder)

    def _remove(self, folder: Path) -> None:
        """Under another name first: a kill in the middle leaves nothing that looks like a checkpoint."""
        if folder.exists():
            going = self.folder / f".{folder.name}.{self.life}.old.tmp"
            os.replace(folder, going)
            remove_tree(going)


def sync_folder(folder: Path) -> None:
    """Make a rename in it durable."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_part(path: Path, pieces: list[list[Any]], values: torch.Tensor) -> str:
    """A safetensors file of consecutive runs of `values`, synced; returns its sha256. Written by hand: the library would hold a second
    copy, and the file would be read again for the checksum."""
    header: dict[str, Any] = {}
    place = 0
    for kind, name, _, start, count in pieces:
        header[f"{kind}/{name}@{start}"] = {"dtype": "F32", "shape": [count], "data_offsets": [4 * place, 4 * (place + count)]}
        place += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = values.view(torch.uint8).numpy().data
    digest = hashlib.sha256()
    blocks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *(data[i : i + BLOCK] for i in range(0, len(data), BLOCK))]
    with open(path, "wb") as file:
        for part in blocks:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
