"""Writing checkpoints: every rank writes its own part in the background while training
continues."""

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

OTHERS_SECONDS = 1800.0  # how long rank 0 waits for the parts of the other ranks
BLOCK = 1 << 24  # bytes that are written and hashed at a time


class CheckpointWriter:
    """The writer of one rank. `save` copies what the rank owns to host memory and returns; a thread
    writes it.

    The parts go to `.step-N.ATTEMPT.tmp`, each with its checksum. When all parts exist, rank 0
    writes state.json, syncs and renames the folder, so a kill at any moment leaves a complete
    checkpoint or none. One save runs at a time: it needs host memory for one copy of the rank's
    own part.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        attempt: str,
        keep: int,
        keep_steps: Collection[int] = (),
    ):
        """`attempt` is the same on all ranks and differs between starts. The newest `keep`
        checkpoints stay, and those at `keep_steps`."""
        self.folder, self.rank, self.size, self.attempt = folder, rank, size, attempt
        self.keep, self.keep_steps = keep, keep_steps
        self.buffer: torch.Tensor | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.stall_seconds = 0.0
        if rank == 0:
            # Left by an attempt that was killed while it saved.
            for left_over in folder.glob(".step-*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(
        self, engine: Engine, state: dict[str, Any], beat: Callable[[], None] = lambda: None
    ) -> None:
        """Start writing the weights and moments of the engine as `step-XXXXXXXX`.

        Waits for an earlier save first. Every rank calls it.
        """
        began = time.monotonic()
        self.wait(beat)
        pieces, values = self._snapshot(engine)
        copied = None
        if values.is_pinned():
            # The GPU copies in its own time: the next training step is behind the copy on the same
            # stream, and the thread waits for this event before it reads the buffer.
            copied = torch.cuda.Event()
            copied.record()
        self.thread = threading.Thread(
            target=self._write,
            args=(pieces, values, copied, state | engine.extra_state()),
            daemon=True,
        )
        self.thread.start()
        self.stall_seconds += time.monotonic() - began

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Wait until the running save is on disk, and raise its error. `beat` is called
        meanwhile."""
        while self.thread:
            self.thread.join(1.0)
            beat()
            if not self.thread.is_alive():
                self.thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a save in the background."""
        if self.error:
            raise self.error

    def _snapshot(self, engine: Engine) -> tuple[list[list[Any]], torch.Tensor]:
        """A copy of what this rank owns: (kind, name, shape, start, count) of each piece, and the
        elements one after the other."""
        owned = []
        for piece in engine.pieces():
            # Ranks that store the same elements each write an equal part of them.
            index, copies = piece.copy
            n = piece.tensor.numel()
            first, end = index * n // copies, (index + 1) * n // copies
            if end > first:
                entry = [
                    piece.kind,
                    piece.name,
                    list(piece.shape),
                    piece.start + first,
                    end - first,
                ]
                owned.append((entry, piece.tensor[first:end].detach()))
        total = sum(tensor.numel() for _, tensor in owned)
        if self.buffer is None or self.buffer.numel() != total:
            self.buffer = torch.empty(total, pin_memory=any(tensor.is_cuda for _, tensor in owned))
        place = 0
        for _, tensor in owned:
            self.buffer[place : place + tensor.numel()].copy_(tensor, non_blocking=True)
            place += tensor.numel()
        return [entry for entry, _ in owned], self.buffer

    def _write(
        self, pieces: list[list[Any]], values: torch.Tensor, copied: Any, state: dict[str, Any]
    ) -> None:
        """In the thread: write the part of this rank, and on rank 0 the rest."""
        temporary = self.folder / f".step-{state['step']:08d}.{self.attempt}.tmp"
        try:
            if copied is not None:
                copied.synchronize()
            with disk_errors(self.folder):
                temporary.mkdir(parents=True, exist_ok=True)
                name = f"part-{self.rank:05d}"
                digest = write_part(temporary / f"{name}.safetensors", pieces, values)
                write_json(
                    temporary / f"{name}.json",
                    {"file": f"{name}.safetensors", "sha256": digest, "pieces": pieces},
                )
                if self.rank == 0:
                    self._finish(temporary, state)
        except BaseException as error:  # raised by the next check; the older checkpoints stay
            self.error = error
            with contextlib.suppress(OSError):
                if self.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    (temporary / f"part-{self.rank:05d}.safetensors").unlink(missing_ok=True)
                    (temporary / f"part-{self.rank:05d}.failed").touch()

    def _finish(self, temporary: Path, state: dict[str, Any]) -> None:
        """Wait for the parts of all ranks, write index and state, rename the folder, remove old
        checkpoints."""
        names = [temporary / f"part-{rank:05d}.json" for rank in range(self.size)]
        deadline = time.monotonic() + OTHERS_SECONDS
        while missing := [path for path in names if not path.exists()]:
            if failed := sorted(path.stem for path in temporary.glob("part-*.failed")):
                raise UserError(
                    f"{temporary}: the rank of {failed[0]} could not write it; see its message",
                    code="train.part-missing",
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"{temporary}: the rank of {missing[0].stem} did not write it within "
                    f"{OTHERS_SECONDS:.0f} s",
                    code="train.part-missing",
                )
            time.sleep(0.02)
        parts = [read_json(path, "part of a checkpoint") for path in names]
        write_json(temporary / INDEX, merge_indexes(parts))
        versions = {"var_scale": var_scale.__version__, "torch": torch.__version__}
        files = {part["file"]: part["sha256"] for part in parts}
        write_json(
            temporary / STATE,
            {"format": FORMAT, **state, "files": files, "versions": versions, "time": time.time()},
        )
        for path in names:
            path.unlink()
        sync_folder(temporary)
        final = self.folder / f"step-{state['step']:08d}"
        self._remove(final)  # a run that was rolled back saves the same step again
        os.replace(temporary, final)
        sync_folder(self.folder)
        old = [c for c in checkpoints(self.folder) if c.step not in self.keep_steps]
        for checkpoint in old[: -self.keep]:
            self._remove(checkpoint.folder)

    def _remove(self, folder: Path) -> None:
        """Rename, then remove: a kill in between leaves nothing that looks like a checkpoint."""
        if folder.exists():
            going = self.folder / f".{folder.name}.{self.attempt}.old.tmp"
            os.replace(folder, going)
            remove_tree(going)


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_part(path: Path, pieces: list[list[Any]], values: torch.Tensor) -> str:
    """Write pieces of `values` as a safetensors file, sync it, and return its sha256.

    The safetensors library would need a second copy in memory, and the checksum another pass over
    the file.
    """
    header: dict[str, Any] = {}
    place = 0
    for kind, name, _, start, count in pieces:
        header[f"{kind}/{name}@{start}"] = {
            "dtype": "F32",
            "shape": [count],
            "data_offsets": [4 * place, 4 * (place + count)],
        }
        place += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    data = values.view(torch.uint8).numpy().data
    digest = hashlib.sha256()
    blocks: list[bytes | memoryview] = [
        len(text).to_bytes(8, "little"),
        text,
        *(data[i : i + BLOCK] for i in range(0, len(data), BLOCK)),
    ]
    with open(path, "wb") as file:
        for part in blocks:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
