"""Reading shards by index: token batches for training, images for tokenizer training and tokenisation."""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from var_scale.data.images import decode_image
from var_scale.data.manifest import Manifest, ShardInfo, load_manifest
from var_scale.data.order import epoch_views, global_batch_indices, rank_slice
from var_scale.data.remote import RemoteShards
from var_scale.data.shards import read_index
from var_scale.data.tar_index import npy_header
from var_scale.data.transforms import eval_transform, train_transform, who_resizes
from var_scale.errors import UserError
from var_scale.files import sha256_file
from var_scale.scales import PatchNum, normal

__all__ = ["Ahead", "Batch", "ImageBatch", "ImageData", "ImageLoader", "TokenData", "TokenLoader"]

IMAGE_CACHE_BYTES = 1 << 29  # decoded images are kept when the whole set is at most this large
SPARE_FILES = 256  # files a process opens for other reasons


class _Shards:
    """The samples of a folder: shard, offset, size and label of each, and the open tars.

    Read, not mapped: a shard that is cut or on a disk that fails is then an error with its name, not the end of the process.
    """

    def __init__(self, folder: Path | RemoteShards, kind: str):
        self.remote = folder if isinstance(folder, RemoteShards) else None
        self.folder = folder.folder if isinstance(folder, RemoteShards) else Path(folder)
        self.manifest: Manifest = load_manifest(self.folder, check_files=self.remote is None)
        if self.manifest.kind != kind:
            raise UserError(f"{self.folder}: holds {self.manifest.kind} shards, {kind} shards are needed here; give another folder")
        self.num_samples, self.num_classes, self.digest = self.manifest.num_samples, self.manifest.num_classes, self.manifest.digest
        index = np.concatenate([read_index(self.folder, shard, check=True) for shard in self.manifest.shards])
        sizes = [shard.samples for shard in self.manifest.shards]
        self.offsets, self.sizes = index["offset"].astype(np.int64), index["size"].astype(np.int64)
        self.labels = index["label"].astype(np.int64)
        self.shard_of = np.repeat(np.arange(len(sizes)), sizes)
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(f"{self.folder}: an index holds a class outside 0..{self.num_classes - 1}; run `var-scale data verify`")
        self._files: dict[int, int] = {}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(sizes) + SPARE_FILES > soft != resource.RLIM_INFINITY:
            if len(sizes) + SPARE_FILES > hard != resource.RLIM_INFINITY:
                raise UserError(f"{self.folder}: {len(sizes)} shards, but a process may open {hard} files; raise `ulimit -n` or make the "
                                "shards larger")  # fmt: skip
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._opening = Lock()

    def shard(self, number: int) -> ShardInfo:
        return self.manifest.shards[number]

    def damaged(self, part: int = 0, parts: int = 1, beat: Callable[[], None] = lambda: None) -> list[int]:
        """Of the shards `part`, `part` + `parts`, ..., those whose bytes do not have the checksum of the manifest."""
        if self.remote:  # compared when they come; what came earlier may have changed since
            self.remote.drop_damaged()
            return []
        numbers = range(part, len(self.manifest.shards), parts)
        with ThreadPoolExecutor(2, "check") as pool:
            found = []
            for number, sound in zip(numbers, pool.map(self._sound, numbers), strict=True):
                beat()
                found += [] if sound else [number]
            return found

    def _sound(self, number: int) -> bool:
        """Whether a shard has its checksum; not if it cannot be read."""
        try:
            return sha256_file(self.folder / self.shard(number).name) == self.shard(number).sha256
        except OSError:
            return False

    def read_into(self, number: int, rows: np.ndarray, starts: Sequence[int]) -> None:
        """Fill each of `rows` (B, n), consecutive in memory, with the bytes of shard `number` from `starts` (B,) on."""
        path = self.folder / self.shard(number).name
        try:
            with self._opening:
                if number not in self._files:
                    self._files[number] = self.remote.open(self.shard(number)) if self.remote else os.open(path, os.O_RDONLY)
            file, whole, size = self._files[number], rows.data.cast("B"), rows[0].nbytes
            for row, start in enumerate(starts):
                if os.preadv(file, [whole[row * size : (row + 1) * size]], start) != size:
                    raise UserError(f"{path}: ends before byte {start + size}; it was cut, run `var-scale data verify {self.folder}`")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def path(self, number: int) -> Path:
        """The file of a shard; a remote one is fetched if it must be."""
        return self.remote.local(self.shard(number)) if self.remote else self.folder / self.shard(number).name

    def by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, positions in `indices` that lie in it), shard by shard."""
        shards = self.shard_of[indices]
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        return zip(numbers.tolist(), np.split(order, starts[1:]), strict=False)

    def checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_samples):
            raise IndexError(f"{self.folder}: sample {indices.min()}..{indices.max()} asked of {self.num_samples}")
        return indices


class TokenData:
    """Token shards with random access.

    UserError: not token shards, made by another tokenizer than `expect_tokenizer_hash` or for other `expect_patch_nums`.
    """

    def __init__(self, folder: Path | RemoteShards, expect_tokenizer_hash: str | None = None,
                 expect_patch_nums: Sequence[PatchNum] | None = None):  # fmt: skip
        self._shards = _Shards(folder, "tokens")
        tokens = self._shards.manifest.tokens
        assert tokens is not None
        self.manifest, self.folder = self._shards.manifest, self._shards.folder
        self.num_samples, self.num_classes, self.digest = self._shards.num_samples, self._shards.num_classes, self._shards.digest
        self.views, self.length, self.vocab_size = int(tokens["views"]), int(tokens["length"]), int(tokens["vocab_size"])
        self.patch_nums, self.tokenizer_hash = normal(tokens["patch_nums"]), str(tokens["tokenizer_hash"])
        if expect_tokenizer_hash is not None and expect_tokenizer_hash != self.tokenizer_hash:
            raise UserError(f"tokens in {folder} were made by tokenizer {self.tokenizer_hash[:12]}, this run uses "
                            f"{expect_tokenizer_hash[:12]}; tokenise again with `var-scale data tokenize` into another folder")
        if expect_patch_nums is not None and normal(expect_patch_nums) != self.patch_nums:
            raise UserError(f"tokens in {folder} have patch_nums {self.patch_nums}, this run uses {normal(expect_patch_nums)}; "
                            "tokenise again with `var-scale data tokenize` into another folder, or change tokenizer.patch_nums")
        self._first_token = self._locate()

    def _locate(self) -> np.ndarray:
        """Position of each sample's first token in its shard, in bytes: int64 (N,)."""
        shards, body = self._shards, 2 * self.views * self.length
        path = shards.path(0)
        header, shape, dtype = npy_header(path, int(shards.offsets[0]))
        if shape != (self.views, self.length) or dtype != np.dtype("<u2") or header + body != shards.sizes[0]:
            raise UserError(f"{path}: holds {dtype} {shape}, the manifest says uint16 {(self.views, self.length)}; make it again")
        if (shards.sizes != shards.sizes[0]).any():
            raise UserError(f"{self.folder}: samples of different sizes; make the tokens again")
        return shards.offsets + shards.sizes - body

    def damaged(self, part: int = 0, parts: int = 1, beat: Callable[[], None] = lambda: None) -> list[int]:
        """Of the shards `part`, `part` + `parts`, ..., those whose bytes do not have the checksum of the manifest."""
        return self._shards.damaged(part, parts, beat)

    def gather(self, indices: np.ndarray, views: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 (B, L) and labels int64 (B,) of samples `indices` (B,); `views` (B,) or one for all."""
        indices = self._shards.checked(indices)
        first = self._first_token[indices] + np.asarray(views, dtype=np.int64) * (2 * self.length)
        tokens_BL = np.empty((len(indices), self.length), dtype=np.int64)
        for number, positions in self._shards.by_shard(indices):
            rows = np.empty((len(positions), self.length), dtype="<u2")
            self._shards.read_into(number, rows, first[positions].tolist())
            tokens_BL[positions] = rows
        return tokens_BL, self._shards.labels[indices]


@dataclass(frozen=True)
class Batch:
    """Tokens int64 (B, L), labels int64 (B,), and the positions (B,) of the samples in the endless stream."""

    tokens_BL: np.ndarray
    labels_B: np.ndarray
    sample_positions_B: np.ndarray


class _Loader:
    """Which samples are the batch of (step, micro-step) of one data-parallel rank: a pure function of (data, seed, step). No state."""

    def __init__(self, num_samples: int, seed: int, global_batch: int, world: int, rank: int, accumulate: int, subset: np.ndarray | None):
        rank_slice(global_batch, world, rank, accumulate, 0)
        self.num_samples, self.seed, self.global_batch = num_samples if subset is None else len(subset), seed, global_batch
        self.subset = subset
        self.world, self.rank, self.accumulate = world, rank, accumulate

    def places(self, step: int, micro_index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample indices, epochs, and positions in the stream, each (B,)."""
        part = rank_slice(self.global_batch, self.world, self.rank, self.accumulate, micro_index)
        indices, epochs = (array[part] for array in global_batch_indices(self.num_samples, self.seed, step, self.global_batch))
        indices = indices if self.subset is None else self.subset[indices]
        return indices, epochs, np.arange(part.start, part.stop, dtype=np.int64) + step * self.global_batch


class TokenLoader(_Loader):
    """The batch of (step, micro-step) for one data-parallel rank; of the samples `subset` alone where it is given."""

    def __init__(self, data: TokenData, seed: int, global_batch: int, world: int = 1, rank: int = 0, accumulate: int = 1,
                 subset: np.ndarray | None = None):  # fmt: skip
        super().__init__(data.num_samples, seed, global_batch, world, rank, accumulate, subset)
        self.data = data

    def batch(self, step: int, micro_index: int = 0) -> Batch:
        """The samples of this rank in micro-step `micro_index` of optimiser step `step` (from 0)."""
        data, (indices, epochs, positions) = self.data, self.places(step, micro_index)
        views = np.zeros(len(indices), dtype=np.int64)
        if data.views > 1:
            for epoch in np.unique(epochs).tolist():
                mask = epochs == epoch
                views[mask] = epoch_views(data.num_samples, self.seed, epoch, data.views)[indices[mask]]
        tokens_BL, labels_B = data.gather(indices, views)
        return Batch(tokens_BL, labels_B, positions)


class Ahead:
    """Reads the next batches of a loader in a thread while the step before them runs. Which batches is still the caller's word."""

    def __init__(self, loader: TokenLoader | ImageLoader, depth: int = 2):
        self.loader, self.depth = loader, depth
        self._pool = ThreadPoolExecutor(1, "data")
        self._coming: deque[tuple[tuple[int, int], Future[Batch | ImageBatch]]] = deque()

    def batch(self, step: int, micro_index: int = 0) -> Batch | ImageBatch:
        """As the loader's. What went wrong in the thread is raised here."""
        if not self._coming or self._coming[0][0] != (step, micro_index):  # the first, or one after a jump
            while self._coming:
                self._coming.pop()[1].cancel()
            self._ask(step, micro_index)
        _, batch = self._coming.popleft()
        last = self._coming[-1][0] if self._coming else (step, micro_index)
        while len(self._coming) < self.depth:
            place = last[0] * self.loader.accumulate + last[1] + 1
            last = divmod(place, self.loader.accumulate)
            self._ask(*last)
        return batch.result()

    def _ask(self, step: int, micro_index: int) -> None:
        self._coming.append(((step, micro_index), self._pool.submit(self.loader.batch, step, micro_index)))


class ImageData:
    """Image shards with random access to decoded images.

    `size` None: the images must all have one size and come as they are. `size` (height, width): the official resize and crop to it, by
    `resize`.
    `threads` decode at a time. Decoded images are kept in memory when the whole set is small.
    """

    def __init__(self, folder: Path | RemoteShards, size: tuple[int, int] | None = None, resize: str = "auto", threads: int = 1):
        self._shards = _Shards(folder, "image")
        self.manifest, self.folder = self._shards.manifest, self._shards.folder
        self.num_samples, self.num_classes, self.digest = self._shards.num_samples, self._shards.num_classes, self._shards.digest
        self.labels = self._shards.labels
        self.size, self.resize = size, who_resizes(resize)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self.shape = (*size, 3) if size else self.decode(0).shape
        nbytes = self.num_samples * int(np.prod(self.shape))
        self._cache = np.empty((self.num_samples, *self.shape), np.uint8) if nbytes <= IMAGE_CACHE_BYTES else None
        self._cached = np.zeros(self.num_samples, dtype=bool)

    def damaged(self, part: int = 0, parts: int = 1, beat: Callable[[], None] = lambda: None) -> list[int]:
        """As TokenData.damaged."""
        return self._shards.damaged(part, parts, beat)

    def decode(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H, W, 3). UserError, naming shard and sample, if it cannot be decoded."""
        shards = self._shards
        number, offset, size = int(shards.shard_of[index]), int(shards.offsets[index]), int(shards.sizes[index])
        where = f"{self.folder / shards.shard(number).name}: sample {index} (byte {offset})"
        payload = np.empty((1, size), dtype=np.uint8)
        shards.read_into(number, payload, [offset])
        return decode_image(payload.tobytes(), where)

    def _still(self, index: int) -> np.ndarray:
        image = self.decode(index)
        if self.size:
            return eval_transform(image, self.size, self.resize)
        if image.shape != self.shape:
            raise UserError(f"{self.folder}: sample {index} is {image.shape[1]}x{image.shape[0]} pixels, the first is "
                            f"{self.shape[1]}x{self.shape[0]}; give the image size so that they are resized and cropped")
        return image

    def _all(self, make: Callable[[int], np.ndarray], indices: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) of what `make` makes of each."""
        return np.stack(list((self._pool.map if self._pool else map)(make, indices.tolist())))

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Samples `indices` (B,), centre-cropped where `size` was given: uint8 (B, H, W, 3)."""
        indices = self._shards.checked(indices)
        if self._cache is None:
            return self._all(self._still, indices)
        new = np.unique(indices[~self._cached[indices]])
        if len(new):
            self._cache[new] = self._all(self._still, new)
            self._cached[new] = True
        return self._cache[indices]

    def random_crops(self, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Samples `indices` with the official random crop, keyed by (seed, epoch, sample): uint8 (B, H, W, 3)."""
        size = self.size
        if size is None:
            return self.images(indices)
        return self._all(lambda index: train_transform(self.decode(index), size, seed, epoch, index, self.resize),
                         self._shards.checked(indices))  # fmt: skip

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`images` and labels int64 (B,), as TokenData.gather."""
        return self.images(indices), self.labels[indices]


@dataclass(frozen=True)
class ImageBatch:
    """Images uint8 (B, H, W, 3), labels int64 (B,), and the positions (B,) of the samples in the endless stream."""

    images_BHWC: np.ndarray
    labels_B: np.ndarray
    sample_positions_B: np.ndarray


class ImageLoader(_Loader):
    """As TokenLoader, with decoded images: the official random crop, and with `flip` half of them mirrored, keyed by sample and epoch."""

    def __init__(self, data: ImageData, seed: int, global_batch: int, world: int = 1, rank: int = 0, accumulate: int = 1,
                 flip: bool = False, subset: np.ndarray | None = None):  # fmt: skip
        super().__init__(data.num_samples, seed, global_batch, world, rank, accumulate, subset)
        self.data, self.flip = data, flip

    def batch(self, step: int, micro_index: int = 0) -> ImageBatch:
        """The samples of this rank in micro-step `micro_index` of optimiser step `step` (from 0)."""
        indices, epochs, positions = self.places(step, micro_index)
        images = np.empty((len(indices), *self.data.shape), np.uint8)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            images[mask] = self.data.random_crops(indices[mask], self.seed, epoch)
            if self.flip:
                mirrored = mask & (epoch_views(self.data.num_samples, self.seed, epoch, 2)[indices] == 1)
                images[mirrored] = images[mirrored, :, ::-1]
        return ImageBatch(images, self.data.labels[indices], positions)
