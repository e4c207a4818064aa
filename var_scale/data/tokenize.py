"""Image shards to token shards, once, so that a sweep does not pay for the tokenizer at every step of every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from var_scale.data.loader import ImageData
from var_scale.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from var_scale.data.shards import ShardSetWriter
from var_scale.errors import UserError
from var_scale.progress import progress

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 (B, H, W, 3) to integer tokens (B, L)."""


def tokenize_folder(image_folder: Path, out_folder: Path, encode: Encode, tokenizer_hash: str, patch_nums: Sequence[int], vocab_size: int,
                    batch: int = 256, samples_per_shard: int = 4096, size: int | None = None, views: int = 1, seed: int = 0) -> Manifest:
    """Encode every image of `image_folder` into uint16 token shards in `out_folder`, in the same order, with progress.

    `size`: resize and crop to it (None: images as they are). `views` 1: the centre crop; more: random crops keyed by
    (seed, view, sample), which need `size`. Continues a killed run after its last complete shard; complete: returns at once.
    UserError: vocab_size over 65536, `out_folder` made by another tokenizer or from other images, tokens of a wrong shape.
    """
    length = sum(side * side for side in patch_nums)
    if not 1 <= vocab_size <= 1 << 16:
        raise UserError(f"vocabulary of {vocab_size}: tokens are stored as uint16, at most 65536; use a smaller tokenizer")
    if views > 1 and size is None:
        raise UserError(f"{views} views need an image size to crop to; give it, or use 1 view")
    images = load_manifest(image_folder)
    tokens = {"dtype": "<u2", "views": views, "length": length, "patch_nums": list(patch_nums), "vocab_size": vocab_size,
              "tokenizer_hash": tokenizer_hash}
    source = {"images": images.source, "images_digest": images.digest, "size": size, "seed": seed,
              "crop": "random" if views > 1 else "centre"}
    _require_tokenizer(Path(out_folder), tokenizer_hash)
    with ShardSetWriter(out_folder, "tokens", images.split, images.num_classes, samples_per_shard, source, tokens) as writer:
        if writer.complete:
            return writer.finish()
        data = ImageData(image_folder, size)
        with progress(f"tokenise {images.split}", data.num_samples, "images", initial=writer.completed_samples()) as bar:
            for shard_start in range(writer.completed_samples(), data.num_samples, samples_per_shard):
                shard_stop = min(shard_start + samples_per_shard, data.num_samples)
                for start in range(shard_start, shard_stop, batch):  # batches never cross a shard: resuming sees the same ones
                    indices = np.arange(start, min(start + batch, shard_stop))
                    tokens_BKL = _encode_views(data, indices, encode, views, seed, length, vocab_size)
                    for sample, label in zip(tokens_BKL, data.labels[indices].tolist(), strict=True):
                        writer.add_tokens(sample, label)
                    bar.update(int(indices[-1]) + 1)
        return writer.finish()


def _require_tokenizer(folder: Path, tokenizer_hash: str) -> None:
    """An existing complete output must come from the same tokenizer."""
    if not (folder / MANIFEST_NAME).exists():
        return
    there = (load_manifest(folder).tokens or {}).get("tokenizer_hash", "none")
    if there != tokenizer_hash:
        raise UserError(f"tokens in {folder} were made by tokenizer {there[:12]}, this run uses {tokenizer_hash[:12]}; "
                        "remove the folder or choose another")


def _encode_views(data: ImageData, indices: np.ndarray, encode: Encode, views: int, seed: int, length: int, vocab_size: int) -> np.ndarray:
    """Tokens (B, views, L) of samples `indices`, checked."""
    encoded = []
    for view in range(views):
        images = data.images(indices) if views == 1 else data.random_crops(indices, seed, view)
        tokens_BL = np.asarray(encode(images))
        if tokens_BL.shape != (len(indices), length) or tokens_BL.dtype.kind not in "iu":
            raise UserError(f"the tokenizer returned {tokens_BL.dtype} {tokens_BL.shape} for {len(indices)} images, integers "
                            f"({len(indices)}, {length}) are needed; check patch_nums against the image size")
        if tokens_BL.min() < 0 or tokens_BL.max() >= vocab_size:
            raise UserError(f"the tokenizer returned tokens in {tokens_BL.min()}..{tokens_BL.max()}, outside 0..{vocab_size - 1}; "
                            "check vocab_size")
        encoded.append(tokens_BL)
    return np.stack(encoded, axis=1)
