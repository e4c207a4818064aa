"""Writing token shards with the tokenizer of a config, on one or several devices."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from var_scale.config.schema import Config
from var_scale.data.manifest import Manifest
from var_scale.data.tokenize import Encode, TokenSet, tokenize_folder
from var_scale.data.transforms import to_minus1_1
from var_scale.errors import UserError
from var_scale.model.encode import encode
from var_scale.model.load import load_tokenizer
from var_scale.progress import progress, say
from var_scale.train.inputs import open_images, require_sound
from var_scale.train.stopping import end_with_launcher

COMPARED = 256  # images whose tokens are compared with those of float32
BATCH = 64  # images encoded at a time: some 10 GB with the official network at 256 pixels


def tokenize(config: Config, split: str, processes: int | None = None) -> Manifest:
    """Encode the image shards of `split` as token shards.

    Args:
        processes: by default one per GPU, or one without a GPU; the tokens do not depend on it.

    Raises:
        UserError: a folder is not given, images changed or have other classes, or a process failed.
    """
    if not getattr(config.data, f"images_{split}") or not getattr(config.data, f"tokens_{split}"):
        raise UserError(
            f"data.images_{split} and data.tokens_{split} are both needed to encode images as "
            "tokens",
            code="train.tokenize-folders",
        )
    processes = processes or max(1, torch.cuda.device_count())
    tokens, encoder = _open(config, split, 0, processes)
    classes = tokens.images.num_classes
    if classes != config.classes and config.data.num_classes:
        raise UserError(
            f"{tokens.images.folder}: has {classes} classes, but the config has {config.classes}; "
            f"set data.num_classes={classes}",
            code="train.classes-differ",
        )
    if tokens.shards.complete:
        return tokens.shards.finish()
    require_sound(config, tokens.images)
    if config.tokenizer.encode_precision != "fp32":
        _compare(config, tokens, encoder)
    if processes == 1:
        return tokenize_folder(tokens, encoder(config.tokenizer.encode_precision), BATCH)
    del encoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # another process will use this device
    _several(config, split, processes, tokens)
    return tokens.shards.finish(tokens.count)


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def _open(
    config: Config, split: str, rank: int, processes: int
) -> tuple[TokenSet, Callable[[str], Encode]]:
    """The shards to write, and a function that returns the encoder in a precision."""
    device, c = _device(rank), config.tokenizer
    vae, identity = load_tokenizer(c, device)
    images = open_images(config, getattr(config.data, f"images_{split}"), processes)
    tokens = TokenSet(
        images,
        Path(getattr(config.data, f"tokens_{split}")),
        identity,
        c.patch_nums,
        c.vocab_size,
        config.data.samples_per_shard,
        config.data.views if split == "train" else 1,
        config.data.flip and split == "train",
        precision=c.encode_precision,
    )

    def encoder(precision: str) -> Encode:
        return lambda images: (
            encode(vae, to_minus1_1(torch.from_numpy(images).to(device)), precision).cpu().numpy()
        )

    return tokens, encoder


def _compare(config: Config, tokens: TokenSet, encoder: Callable[[str], Encode]) -> None:
    """Print how many tokens the faster numerics change."""
    indices, batch = np.arange(min(COMPARED, tokens.images.num_samples)), BATCH
    parts = np.split(indices, range(batch, len(indices), batch))
    exact, other = (
        np.concatenate([tokens.encode(part, encoder(precision)) for part in parts])
        for precision in ("fp32", config.tokenizer.encode_precision)
    )
    say(
        f"{config.tokenizer.encode_precision} changes {(exact != other).mean():.2%} of the tokens "
        f"({len(indices)} images compared)"
    )


def _several(config: Config, split: str, processes: int, tokens: TokenSet) -> None:
    """One process per device, each with its own shards."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", tokens.done())
    parts = [
        context.Process(target=_part, args=(config, split, rank, processes, count), daemon=True)
        for rank in range(processes)
    ]
    for part in parts:
        part.start()
    try:
        with progress(
            f"tokenize {split}", tokens.images.num_samples, "images", initial=count.value
        ) as bar:
            while any(part.is_alive() for part in parts):
                bar.update(count.value)
                if any(part.exitcode for part in parts):
                    break
                time.sleep(0.2)
            bar.update(count.value)
    finally:
        failed = any(part.exitcode for part in parts)
        for part in parts:
            part.terminate()
            part.join()
    if failed:
        raise UserError(
            f"tokenize {split}: a process failed, see above; run the same command again, it "
            "continues",
            code="train.tokenize-failed",
        )


def _part(config: Config, split: str, rank: int, processes: int, count: Synchronized[Any]) -> None:
    """The work of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this
    end_with_launcher()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)

    def seen(images: int) -> None:
        with count.get_lock():
            count.value += images

    try:
        tokens, encoder = _open(config, split, rank, processes)
        tokens.write(encoder(config.tokenizer.encode_precision), BATCH, rank, processes, seen)
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
