"""What a run reads: token shards, or image shards that are tokenised in the step. Both look the same to the loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from var_scale.config.schema import Config
from var_scale.data.loader import Batch, ImageBatch, ImageData, ImageLoader, TokenData, TokenLoader
from var_scale.data.manifest import Manifest
from var_scale.data.order import epoch_permutation
from var_scale.data.remote import located
from var_scale.data.shards import CHANGED
from var_scale.data.transforms import to_minus1_1
from var_scale.errors import UserError
from var_scale.files import canonical_hash
from var_scale.machine import cores
from var_scale.model.encode import encode
from var_scale.model.vqvae import VQVAE
from var_scale.train.world import World

SHARE_SEED = 2**62  # apart from the seeds of runs
NO_TOKENS = ("data.tokens_train and data.tokens_val are needed for training; make them with `var-scale data tokenize`, or train from "
             "images with data.online=true")  # fmt: skip


def chosen(num_samples: int, fraction: float | None) -> np.ndarray | None:
    """The samples of a share, the same for every seed, a larger share holding the smaller; None: all."""
    if fraction is None:
        return None
    return np.sort(epoch_permutation(num_samples, SHARE_SEED, 0)[: max(1, int(fraction * num_samples))])


class Tokens:
    """Token shards of one split."""

    name = "token shards"

    def __init__(self, data: TokenData, world: World, fraction: float | None = None):
        self.data, self.world, self.subset = data, world, chosen(data.num_samples, fraction)
        self.num_samples, self.digest = data.num_samples if self.subset is None else len(self.subset), data.digest

    @property
    def manifest(self) -> Manifest:
        """Of the shards."""
        return self.data.manifest

    def loader(self, seed: int, batch: int, world: int, rank: int, accumulate: int) -> TokenLoader | ImageLoader:
        """The stream of training batches."""
        return TokenLoader(self.data, seed, batch, world, rank, accumulate, self.subset)

    def tensors(self, batch: Batch | ImageBatch) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of a batch, on the device."""
        assert isinstance(batch, Batch)
        return self.world.put(torch.as_tensor(batch.tokens_BL)).long(), self._labels(batch.labels_B)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of samples for an evaluation: the first view."""
        tokens_BL, labels_B = self.data.gather(indices)
        return self.world.put(torch.as_tensor(tokens_BL)).long(), self._labels(labels_B)

    def _labels(self, labels_B: np.ndarray) -> Tensor:
        return self.world.put(torch.as_tensor(labels_B)).long()


class Images(Tokens):
    """Image shards of one split: random crops for training, centre crops for evaluation, encoded on the device as `data tokenize` would."""

    name = "images, tokenised in the step"
    data: ImageData  # type: ignore[assignment]

    def __init__(self, data: ImageData, world: World, vae: VQVAE, tokenizer_hash: str, flip: bool, precision: str,
                 fraction: float | None = None):  # fmt: skip
        super().__init__(data, world, fraction)  # type: ignore[arg-type]
        self.vae, self.flip, self.precision = vae, flip, precision
        self.digest = canonical_hash([data.digest, tokenizer_hash, data.resize, precision])

    def loader(self, seed: int, batch: int, world: int, rank: int, accumulate: int) -> TokenLoader | ImageLoader:
        """The stream of training batches."""
        return ImageLoader(self.data, seed, batch, world, rank, accumulate, self.flip, self.subset)

    def tensors(self, batch: Batch | ImageBatch) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of a batch, on the device."""
        assert isinstance(batch, ImageBatch)
        return self._encode(batch.images_BHWC), self._labels(batch.labels_B)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) of samples for an evaluation: the centre crop."""
        images, labels_B = self.data.gather(indices)
        return self._encode(images), self._labels(labels_B)

    def _encode(self, images: np.ndarray) -> Tensor:
        return encode(self.vae, to_minus1_1(self.world.put(torch.as_tensor(images))), self.precision)


def local_processes(processes: int) -> int:
    """Of so many, those on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def open_images(config: Config, folder: str | None, processes: int = 1) -> ImageData:
    """A folder of image shards as the config wants images: of the tokenizer's size, decoded by as many threads as it says."""
    if not folder:
        raise UserError("data.images_train and data.images_val are needed; give folders of image shards")
    size = None if config.data.leaves else config.tokenizer.image_size  # images of others are resized and cropped
    data = config.data
    threads = data.decoders or min(8, max(1, cores() // local_processes(processes)))
    return ImageData(located(folder, data.cache, data.cache_gb), size, data.resize, threads)


def require_sound(config: Config, images: ImageData, world: World | None = None) -> None:
    """UserError for image shards whose bytes are not those of the manifest, unless `data.check` leaves that to their sizes. With `world`
    every rank calls it, and they share the work."""
    if config.data.check == "sha256":
        damaged = images.damaged(*((world.rank, world.size) if world else (0, 1)))
        worst = 1 + damaged[0] if damaged else 0
        if worst := world.largest(worst) if world else worst:
            raise UserError(f"{images.folder / images.manifest.shards[worst - 1].name}: {CHANGED}")


def open_data(
    config: Config, vae: VQVAE, tokenizer_hash: str, world: World, beat: Callable[[], None] = lambda: None
) -> tuple[Tokens, Tokens]:
    """Training and validation data, checked against the config and its checksums; every rank calls it. `beat`: called at every shard."""
    data = config.data

    def opened(split: str) -> Tokens:
        folder = getattr(data, f"{'images' if data.online else 'tokens'}_{split}")
        fraction = data.fraction if split == "train" else None
        if data.online:
            found: Tokens = Images(open_images(config, folder, world.size), world, vae, tokenizer_hash, data.flip,
                                   config.tokenizer.encode_precision, fraction)  # fmt: skip
        elif not folder:
            raise UserError(NO_TOKENS)
        else:
            found = Tokens(TokenData(located(folder, data.cache, data.cache_gb), tokenizer_hash, config.tokenizer.patch_nums), world,
                           fraction)  # fmt: skip
        if (there := found.data.num_classes) != config.classes:
            raise UserError(f"{folder}: has {there} classes, the config says {config.classes}; set data.num_classes={there}")
        if data.check == "sha256":
            damaged = found.data.damaged(world.rank, world.size, beat)
            if worst := world.largest(1 + damaged[0] if damaged else 0):
                raise UserError(f"{found.data.folder / found.manifest.shards[worst - 1].name}: {CHANGED}")
        return found

    train, val = opened("train"), opened("val")
    if (names := train.manifest.class_names) and val.manifest.class_names and names != val.manifest.class_names:
        odd = next(n for n, pair in enumerate(zip_longest(names, val.manifest.class_names)) if pair[0] != pair[1])
        raise UserError(f"class {odd} has another name in the training data than in the validation data; make both of the same classes")
    return train, val
