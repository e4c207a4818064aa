"""Training a tokenizer: from its saved state to its weights and its report."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_scale.config.load import load
from var_scale.config.schema import Config
from var_scale.data.image_loader import ImageData
from var_scale.errors import Preempted, UserError
from var_scale.files import disk_errors, read_json, write_json
from var_scale.locks import take_lock
from var_scale.machine import cores
from var_scale.model.load import save_tokenizer
from var_scale.progress import progress, say
from var_scale.run_folder import RunFolder, tokenizer_file
from var_scale.train.inputs import open_images, require_sound
from var_scale.train.stopping import end_with_launcher, signals_noted
from var_scale.train.tokenizer_report import assess, perplexity, picture
from var_scale.train.tokenizer_trainer import TokenizerTrainer
from var_scale.train.world import World, leave, start_world

SAVE_SECONDS, SAVE_SHARE = 10.0, 0.02
"""Time between saves, or longer, so that saving takes at most this share of the time."""
ROW_STEPS = 50
"""Steps between rows of metrics.jsonl."""


def train_tokenizer(
    config: Config, train: ImageData, val: ImageData, folder: Path, world: World | None = None
) -> Path:
    """Train a tokenizer, write its report, and return its weights file.

    Returns at once if a tokenizer with the same settings and images exists. Without `world` it
    trains in this process, on a GPU or on all cores.

    Raises:
        UserError: the folder holds another tokenizer, another process trains it, or the loss is not
            finite.
        Preempted: it was asked to stop, and saved.
    """
    if world is None:
        world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        torch.set_num_threads(cores())
    target = tokenizer_file(folder)
    trainer = TokenizerTrainer(config, train, folder, world)
    done = folder / "tokenizer.json"
    if target.exists() and done.exists() and read_json(done).get("identity") == trainer.identity:
        if trainer.world.main:
            say(f"tokenizer: already trained ({target})")
        return target
    if target.exists() and done.exists():
        raise UserError(
            f"{folder}: holds a tokenizer that was trained with other settings or on other images; "
            "choose another folder, or remove it together with the tokens and runs that use it",
            code="train.tokenizer-other",
        )
    require_sound(config, train, trainer.world)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / ".lock", wait_seconds=5) if world.main else None
    if world.largest(int(world.main and lock is None)):
        raise UserError(
            f"{folder}: another process trains this tokenizer; wait for it or stop it",
            code="train.tokenizer-locked",
        )
    try:
        _train(config, trainer, val)
    finally:
        if lock is not None:
            os.close(lock)
    return target


def _train(config: Config, trainer: TokenizerTrainer, val: ImageData) -> None:
    """Train from the saved state to the end, and write the report."""
    folder, world, target = trainer.folder, trainer.world, tokenizer_file(trainer.folder)
    trainer.resume()
    world.barrier()  # no rank still looks for training.pt when rank 0 removes it
    trainer.vae.train()
    pace, log = Pace(), RunFolder(folder)
    if world.main and log.metrics.exists():
        log.append_metrics({"kind": "restart", "step": trainer.step})
    steps, stop_file = trainer.recipe.steps, folder / "STOP"
    with (
        progress("tokenizer", steps, "steps", trainer.step, shown=world.main) as bar,
        signals_noted() as noted,
    ):
        while trainer.step < steps:
            row = trainer.train_step()
            asked = bool(noted) or (world.main and stop_file.exists())
            if world.largest(asked):
                trainer.save()
                if world.main:
                    say(f"tokenizer: stopped at step {trainer.step} of {steps}, saved")
                raise Preempted
            # Reading the loss makes the host wait for a GPU, so there it is read for rows only.
            if trainer.step % ROW_STEPS == 0 or world.device.type == "cpu":
                loss = float(row["loss"])
                if not math.isfinite(loss):
                    raise UserError(
                        f"{folder}: step {trainer.step}: the loss is not finite; lower "
                        "tokenizer.train.lr, and training starts again",
                        code="train.tokenizer-nonfinite",
                    )
                bar.update(trainer.step, f"loss {loss:.4f}")
                if world.main and trainer.step % ROW_STEPS == 0:
                    log.append_metrics(_row(trainer, row))
                if world.main and pace.due():
                    trainer.save()
                    pace.saved()
    vae = trainer.finish()
    if world.main:
        save_tokenizer(vae, target)
        report = assess(vae, val, world.device, trainer.vgg)
        picture(vae, val, folder / "reconstructions.png", world.device)
        write_json(
            folder / "tokenizer.json",
            {"identity": trainer.identity, "steps": trainer.recipe.steps, **report},
        )
        (folder / "training.pt").unlink(missing_ok=True)
        distance = f"; VGG-16 Frechet distance {report['rfd_vgg16']:.2f}" if trainer.vgg else ""
        of_scales = " ".join(f"{p:.0f}" for p in report["perplexity_per_scale"])
        say(
            f"tokenizer: validation PSNR {report['psnr_db']:.2f} dB, MAE {report['mae']:.4f}; "
            f"codebook perplexity per scale {of_scales} of "
            f"{config.tokenizer.vocab_size}{distance}; picture {folder / 'reconstructions.png'}"
        )
    world.barrier()


class Pace:
    """Decides when to save, so that saving stays cheap."""

    def __init__(self) -> None:
        self.last = self.began = time.monotonic()
        self.took = 0.0

    def due(self) -> bool:
        """Whether a save is due."""
        self.began = time.monotonic()
        return self.began - self.last > max(SAVE_SECONDS, self.took / SAVE_SHARE)

    def saved(self) -> None:
        """Call it when the save that was due is finished."""
        self.last = time.monotonic()
        self.took = self.last - self.began


def _row(trainer: TokenizerTrainer, row: dict[str, Tensor]) -> dict[str, Any]:
    """The row of a step: losses, and the perplexity of each scale in its batch."""
    numbers: dict[str, Any] = {key: float(value) for key, value in row.items()}
    if trainer.codes:
        hits = torch.stack([torch.bincount(idx, minlength=trainer.vae.V) for idx in trainer.codes])
        numbers["perplexity_per_scale"] = perplexity(hits)
    return {"kind": "tokenizer", "step": trainer.step, "lr": trainer.lr(), **numbers}


def main() -> None:
    """Runs on every rank: `python -m var_scale.train.tokenizer FOLDER`, with FOLDER/config.yaml."""
    folder = Path(sys.argv[1])
    config = load(str(folder / "config.yaml"))
    end_with_launcher()
    world, code = start_world(True, config.engine.threads), 0
    try:
        train, val = (
            open_images(config, where, world.size)
            for where in (config.data.images_train, config.data.images_val)
        )
        train_tokenizer(config, train, val, folder, world)
    except UserError as error:
        print(f"error: {f'rank {world.rank}: ' * (not world.main)}{error}", flush=True)
        code = error.exit_code
    except Preempted:
        pass  # it saved; launchers would treat any code but 0 as a failure
    leave(world, code)


if __name__ == "__main__":
    main()
