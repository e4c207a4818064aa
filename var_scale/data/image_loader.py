"""Image batches for training tokenizers, for encoding, and for training from images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from var_scale.data.image_sizes import image_size, require_one_size
from var_scale.data.images import decode_image
from var_scale.data.loader import Loader
from var_scale.data.order import epoch_views
from var_scale.data.reader import ShardReader
from var_scale.data.remote import RemoteShards
from var_scale.data.transforms import eval_transform, train_transform, who_resizes
from var_scale.errors import UserError

IMAGE_CACHE_BYTES = 1 << 29
"""Decoded images are kept in memory if the whole set is at most this large."""


class ImageData(ShardReader):
    """Image shards with random access to decoded images.

    Args:
        size: (height, width) of the official resize and crop; None: all images must have the same
            size and are not changed.
        resize: which library resizes: auto, torch or pillow.
        threads: how many images are decoded at a time.

    Decoded images are kept in memory if the whole set is small.
    """

    def __init__(
        self,
        folder: Path | RemoteShards,
        size: tuple[int, int] | None = None,
        resize: str = "auto",
        threads: int = 1,
    ):
        super().__init__(folder, "image")
        self.size, self.resize = size, who_resizes(resize)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self.shape = (*size, 3) if size else self.decode(0).shape
        nbytes = self.num_samples * int(np.prod(self.shape))
        self._cache = (
            np.empty((self.num_samples, *self.shape), np.uint8)
            if nbytes <= IMAGE_CACHE_BYTES
            else None
        )
        self._cached = np.zeros(self.num_samples, dtype=bool)

    def decode(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H, W, 3).

        Raises:
            UserError: it cannot be decoded; names shard and sample.
        """
        return decode_image(self._head(index), self._where(index))

    def require_one_size(self) -> None:
        """Check by their headers that all images have the same size.

        Raises:
            UserError: code `data.image-sizes`, or an image cannot be read.
        """
        require_one_size(
            (where, image_size(partial(self._head, index), where))
            for index in range(self.num_samples)
            for where in (self._where(index),)
        )

    def _where(self, index: int) -> str:
        """The place of a sample, for messages."""
        name = self.shard(int(self.shard_of[index])).name
        return f"{self.folder / name}: sample {index} (byte {int(self.offsets[index])})"

    def _head(self, index: int, count: int = -1) -> bytes:
        """The first `count` bytes of the file of a sample; -1: all."""
        size = int(self.sizes[index])
        payload = np.empty((1, min(size, count) if count >= 0 else size), dtype=np.uint8)
        self.read_into(int(self.shard_of[index]), payload, [int(self.offsets[index])])
        return payload.tobytes()

    def _still(self, index: int) -> np.ndarray:
        """Sample `index` at its centre crop, or as it is where no size is given."""
        image = self.decode(index)
        if self.size:
            return eval_transform(image, self.size, self.resize)
        if image.shape != self.shape:
            raise UserError(
                f"{self.folder}: sample {index} has {image.shape[1]}x{image.shape[0]} pixels, but "
                f"the first has {self.shape[1]}x{self.shape[0]}; give the image size, to which "
                "they are then resized and cropped",
                code="data.image-sizes",
            )
        return image

    def _all(self, make: Callable[[int], np.ndarray], indices: np.ndarray) -> np.ndarray:
        """The results of `make` for all indices, (B, H, W, 3)."""
        return np.stack(list((self._pool.map if self._pool else map)(make, indices.tolist())))

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Samples `indices` (B,), centre-cropped to `size`: uint8 (B, H, W, 3)."""
        indices = self.checked(indices)
        if self._cache is None:
            return self._all(self._still, indices)
        new = np.unique(indices[~self._cached[indices]])
        if len(new):
            self._cache[new] = self._all(self._still, new)
            self._cached[new] = True
        return self._cache[indices]

    def random_crops(self, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Samples `indices` with the official random crop, keyed by (seed, epoch, sample): uint8
        (B, H, W, 3)."""
        size = self.size
        if size is None:
            return self.images(indices)
        return self._all(
            lambda index: train_transform(
                self.decode(index), size, seed, epoch, index, self.resize
            ),
            self.checked(indices),
        )

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`images` and labels int64 (B,)."""
        return self.images(indices), self.labels[indices]


@dataclass(frozen=True)
class ImageBatch:
    """Images uint8 (B, H, W, 3), labels int64 (B,), and positions (B,) of the samples in the
    endless stream."""

    images_BHWC: np.ndarray
    labels_B: np.ndarray
    sample_positions_B: np.ndarray


class ImageLoader(Loader):
    """The image batches of one data-parallel rank: the official random crop, and with `flip` half
    of the images mirrored, both keyed by sample and epoch."""

    def __init__(
        self,
        data: ImageData,
        seed: int,
        global_batch: int,
        world: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        flip: bool = False,
        subset: np.ndarray | None = None,
    ):
        super().__init__(data.num_samples, seed, global_batch, world, rank, accumulate, subset)
        self.data, self.flip = data, flip

    def batch(self, step: int, micro_index: int = 0) -> ImageBatch:
        """The samples of this rank in micro-step `micro_index` of step `step` (from 0)."""
        indices, epochs, positions = self.places(step, micro_index)
        images = np.empty((len(indices), *self.data.shape), np.uint8)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            images[mask] = self.data.random_crops(indices[mask], self.seed, epoch)
            if self.flip:
                mirrored = mask & (
                    epoch_views(self.data.num_samples, self.seed, epoch, 2)[indices] == 1
                )
                images[mirrored] = images[mirrored, :, ::-1]
        return ImageBatch(images, self.data.labels[indices], positions)
