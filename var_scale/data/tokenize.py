"""Encoding image shards as token shards, once, so that a sweep does not run the tokenizer in every
step of every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from var_scale.data.image_loader import ImageData
from var_scale.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from var_scale.data.shards import ShardSet, token_sample
from var_scale.errors import UserError
from var_scale.progress import progress
from var_scale.scales import PatchNum, length, normal

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 (B, H, W, 3) to integer tokens (B, L)."""


class TokenSet:
    """The token shards of a folder of images, in the same order. Several processes may write parts.

    Args:
        views: 1 for the centre crop, if `images.size` is given; more for random crops keyed by
            (seed, view, sample).
        flip: store the mirror image after each view, so twice as many views.
        precision: is recorded, because other numerics change some tokens.

    Raises:
        UserError: vocab_size exceeds 65536, views of images that are not cropped, or `out` comes
            from another tokenizer or other images.
    """

    def __init__(
        self,
        images: ImageData,
        out: Path,
        tokenizer_hash: str,
        patch_nums: Sequence[PatchNum],
        vocab_size: int,
        samples_per_shard: int = 4096,
        views: int = 1,
        flip: bool = False,
        seed: int = 0,
        precision: str = "fp32",
    ):
        if not 1 <= vocab_size <= 1 << 16:
            raise UserError(
                f"vocabulary of {vocab_size}: tokens are stored as uint16, so at most 65536 are "
                "possible; use a smaller vocabulary",
                code="data.vocabulary",
            )
        if views > 1 and images.size is None:
            raise UserError(
                f"{views} views need an image size to crop to; give it, or use 1 view",
                code="data.views",
            )
        _require_tokenizer(Path(out), tokenizer_hash)
        self.images, self.vocab_size = images, vocab_size
        self.views, self.flip, self.seed = views, flip, seed
        self.length = length(patch_nums)
        tokens = {
            "dtype": "<u2",
            "views": views * (2 if flip else 1),
            "length": self.length,
            "patch_nums": list(normal(patch_nums)),
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
        }
        source: dict[str, Any] = {
            "images": images.manifest.source,
            "images_digest": images.digest,
            "size": images.size,
            "seed": seed,
            "crop": "random" if views > 1 else "centre",
            "resize": images.resize if images.size else None,
            "flip": flip,
            "precision": precision,
        }
        self.shards = ShardSet(
            out,
            "tokens",
            images.manifest.split,
            images.num_classes,
            samples_per_shard,
            source,
            tokens,
        )
        self.count = -(-images.num_samples // samples_per_shard)

    def done(self) -> int:
        """Number of samples in complete shards."""
        if self.shards.complete:
            return self.images.num_samples
        return sum(
            record["samples"]
            for number in range(self.count)
            if (record := self.shards.record(number))
        )

    def write(
        self,
        encode: Encode,
        batch: int = 256,
        part: int = 0,
        parts: int = 1,
        seen: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write the missing ones of the shards `part`, `part` + `parts`, ...

        `seen` is called with the number of images of each batch.
        """
        size = self.shards.samples_per_shard
        for number in range(part, self.count, parts):
            if self.shards.complete or self.shards.record(number) is not None:
                continue
            first, last = number * size, min((number + 1) * size, self.images.num_samples)
            samples = []
            # Batches never cross a shard, so that a command that continues encodes the same ones:
            # on some devices the rounding depends on the batch.
            for start in range(first, last, batch):
                indices = np.arange(start, min(start + batch, last))
                tokens_BKL = self.encode(indices, encode)
                samples += [
                    token_sample(t, label)
                    for t, label in zip(
                        tokens_BKL, self.images.labels[indices].tolist(), strict=True
                    )
                ]
                seen(len(indices))
            self.shards.write(number, samples)

    def encode(self, indices: np.ndarray, encode: Encode) -> np.ndarray:
        """Tokens (B, views, L) of samples `indices`.

        Raises:
            UserError: the tokenizer returned something else.
        """
        encoded = []
        for view in range(self.views):
            images = (
                self.images.images(indices)
                if self.views == 1
                else self.images.random_crops(indices, self.seed, view)
            )
            for shown in (images, images[:, :, ::-1]) if self.flip else (images,):
                tokens_BL = np.asarray(encode(np.ascontiguousarray(shown)))
                if (
                    tokens_BL.shape != (len(indices), self.length)
                    or tokens_BL.dtype.kind not in "iu"
                ):
                    raise UserError(
                        f"the tokenizer returned {tokens_BL.dtype} {tokens_BL.shape} for "
                        f"{len(indices)} images, but integers ({len(indices)}, {self.length}) are "
                        "needed; check patch_nums against the image size",
                        code="data.tokenizer-output",
                    )
                if tokens_BL.min() < 0 or tokens_BL.max() >= self.vocab_size:
                    raise UserError(
                        f"the tokenizer returned tokens from {tokens_BL.min()} to "
                        f"{tokens_BL.max()}, outside of 0 to {self.vocab_size - 1}; check "
                        "vocab_size",
                        code="data.tokenizer-output",
                    )
                encoded.append(tokens_BL)
        return np.stack(encoded, axis=1)


def tokenize_folder(tokens: TokenSet, encode: Encode, batch: int = 256) -> Manifest:
    """Write all shards in this process, with progress; continues after the last complete shard."""
    if not tokens.shards.complete:
        done = tokens.done()
        with progress(
            f"tokenize {tokens.shards.split}", tokens.images.num_samples, "images", initial=done
        ) as bar:

            def seen(count: int) -> None:
                nonlocal done
                done += count
                bar.update(done)

            tokens.write(encode, batch, seen=seen)
    return tokens.shards.finish(tokens.count)


def _require_tokenizer(folder: Path, tokenizer_hash: str) -> None:
    """Refuse an existing complete output of another tokenizer."""
    if not (folder / MANIFEST_NAME).exists():
        return
    existing = (load_manifest(folder).tokens or {}).get("tokenizer_hash", "none")
    if existing != tokenizer_hash:
        raise UserError(
            f"tokens in {folder} come from tokenizer {existing[:12]}, but this run uses "
            f"{tokenizer_hash[:12]}; remove the folder or choose another",
            code="data.other-tokenizer",
        )
