"""What a run reads: token shards, or image shards that are encoded within the step. Both look the
same to the loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from var_scale.config.schema import Config, TrainConfig
from var_scale.data.image_loader import ImageBatch, ImageData, ImageLoader
from var_scale.data.loader import Batch, TokenData, TokenLoader
from var_scale.data.manifest import CHANGED, Manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.reader import ShardReader
from var_scale.data.remote import located
from var_scale.data.transforms import to_minus1_1
from var_scale.errors import UserError
from var_scale.files import canonical_hash
from var_scale.launchers import place_on_node
from var_scale.machine import cores
from var_scale.model.encode import encode
from var_scale.model.vqvae import VQVAE
from var_scale.train.world import World

SHARE_SEED = 2**62
"""Seed of the permutation whose first samples are the share `data.fraction`; no run has it."""
NO_TOKENS = (
    "data.tokens_train and data.tokens_val are needed for training; create them with `var-scale "
    "data tokenize`, or train from images with data.online=true"
)


def chosen(num_samples: int, fraction: float | None) -> np.ndarray | None:
    """The indices of a share of the samples; None for all.

    They are the same for every seed, and a larger share contains the smaller.
    """
    if fraction is None:
        return None
    return np.sort(
        epoch_permutation(num_samples, SHARE_SEED, 0)[: max(1, int(fraction * num_samples))]
    )


class Tokens:
    """Token shards of one split."""

    name = "token shards"

    def __init__(self, data: TokenData, world: World, fraction: float | None = None):
        self.data, self.world, self.subset = data, world, chosen(data.num_samples, fraction)
        self.num_samples = data.num_samples if self.subset is None else len(self.subset)
        self.digest = data.digest

    @property
    def manifest(self) -> Manifest:
        """The manifest of the shards."""
        return self.data.manifest

    def loader(self, train: TrainConfig) -> TokenLoader | ImageLoader:
        """The training batches of this rank."""
        return TokenLoader(self.data, *self._part(train), self.subset)

    def _part(self, train: TrainConfig) -> tuple[int, int, int, int, int]:
        """Seed, batch size, number of ranks, rank and accumulation, as loaders take them."""
        return train.seed, train.batch_size, self.world.size, self.world.rank, train.accumulate

    def tensors(self, batch: Batch | ImageBatch) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of a batch, on the device."""
        assert isinstance(batch, Batch)
        return self.world.put(torch.as_tensor(batch.tokens_BL)).long(), self._labels(batch.labels_B)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of the first view of samples, for an evaluation."""
        tokens_BL, labels_B = self.data.gather(indices)
        return self.world.put(torch.as_tensor(tokens_BL)).long(), self._labels(labels_B)

    def _labels(self, labels_B: np.ndarray) -> Tensor:
        return self.world.put(torch.as_tensor(labels_B)).long()


class Images(Tokens):
    """Image shards of one split: random crops for training and centre crops for evaluation, encoded
    on the device exactly as `data tokenize` does."""

    name = "images, encoded in the step"
    data: ImageData  # type: ignore[assignment]

    def __init__(
        self,
        data: ImageData,
        world: World,
        vae: VQVAE,
        tokenizer_hash: str,
        flip: bool,
        precision: str,
        fraction: float | None = None,
    ):
        super().__init__(data, world, fraction)  # type: ignore[arg-type]
        self.vae, self.flip, self.precision = vae, flip, precision
        self.digest = canonical_hash([data.digest, tokenizer_hash, data.resize, precision])

    def loader(self, train: TrainConfig) -> TokenLoader | ImageLoader:
        """The training batches of this rank."""
        return ImageLoader(self.data, *self._part(train), self.flip, self.subset)

    def tensors(self, batch: Batch | ImageBatch) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of a batch, on the device."""
        assert isinstance(batch, ImageBatch)
        return self._encode(batch.images_BHWC), self._labels(batch.labels_B)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of the centre crops of samples, for an evaluation."""
        images, labels_B = self.data.gather(indices)
        return self._encode(images), self._labels(labels_B)

    def _encode(self, images: np.ndarray) -> Tensor:
        return encode(
            self.vae, to_minus1_1(self.world.put(torch.as_tensor(images))), self.precision
        )


def open_images(config: Config, folder: str | None, processes: int = 1) -> ImageData:
    """Open a folder of image shards, with images of the size of the tokenizer.

    Raises:
        UserError: no folder is given, or it cannot be used.
    """
    if not folder:
        raise UserError(
            "data.images_train and data.images_val are needed; give folders of image shards",
            code="train.images-missing",
        )
    # The embedded images already have this size; all others are resized and cropped.
    size = None if config.data.shapes else config.tokenizer.image_size
    data = config.data
    ranks = place_on_node()[1]
    threads = data.decoders or min(8, max(1, cores() // (ranks if ranks > 1 else processes)))
    return ImageData(located(folder, data.cache, data.cache_gb), size, data.resize, threads)


def require_sound(
    config: Config,
    data: ShardReader,
    world: World | None = None,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Compare shards with the checksums of their manifest, unless `data.check=size`.

    With `world` every rank calls it, and the ranks share the work. `beat` is called after every
    shard.

    Raises:
        UserError: a shard has changed.
    """
    if config.data.check == "sha256":
        damaged = data.damaged(*((world.rank, world.size) if world else (0, 1)), beat)
        # Shards are counted from 1 here, so that 0 means that no rank found a damaged one.
        worst = 1 + damaged[0] if damaged else 0
        if worst := world.largest(worst) if world else worst:
            shard = data.folder / data.shard(worst - 1).name
            raise UserError(f"{shard}: {CHANGED}", code="train.shard-changed")


def open_data(
    config: Config,
    vae: VQVAE,
    tokenizer_hash: str,
    world: World,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Tokens, Tokens]:
    """Open training and validation data and check them against the config and their checksums.

    Every rank calls it. `beat` is called after every shard.

    Raises:
        UserError: data are missing, changed, or do not fit the config.
    """
    data = config.data

    def opened(split: str) -> Tokens:
        folder = getattr(data, f"{'images' if data.online else 'tokens'}_{split}")
        fraction = data.fraction if split == "train" else None
        if data.online:
            found: Tokens = Images(
                open_images(config, folder, world.size),
                world,
                vae,
                tokenizer_hash,
                data.flip,
                config.tokenizer.encode_precision,
                fraction,
            )
        elif not folder:
            raise UserError(NO_TOKENS, code="train.tokens-missing")
        else:
            found = Tokens(
                TokenData(
                    located(folder, data.cache, data.cache_gb),
                    tokenizer_hash,
                    config.tokenizer.patch_nums,
                ),
                world,
                fraction,
            )
        if (classes := found.data.num_classes) != config.classes:
            raise UserError(
                f"{folder}: has {classes} classes, but the config has {config.classes}; set "
                f"data.num_classes={classes}",
                code="train.classes-differ",
            )
        require_sound(config, found.data, world, beat)
        return found

    train, val = opened("train"), opened("val")
    if (
        (names := train.manifest.class_names)
        and val.manifest.class_names
        and names != val.manifest.class_names
    ):
        odd = next(
            n
            for n, pair in enumerate(zip_longest(names, val.manifest.class_names))
            if pair[0] != pair[1]
        )
        raise UserError(
            f"class {odd} has another name in the training data than in the validation data; "
            "write both with the same classes",
            code="train.class-names-differ",
        )
    return train, val
