"""Reading sets of images: npz files, folders of pictures, image shards."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from var_scale.data.image_files import say_left_out, walk_images
from var_scale.data.image_loader import ImageData
from var_scale.data.image_sizes import Size, image_size, require_one_size, shown
from var_scale.data.images import decode_image
from var_scale.data.manifest import MANIFEST_NAME
from var_scale.data.tar_index import read_npy_header
from var_scale.errors import UserError
from var_scale.files import require_content, require_exists


def read_images(path: Path, batch: int = 64) -> Iterator[np.ndarray]:
    """Read uint8 images (b, H, W, 3) from an npz, a folder of pictures, or a folder of image
    shards, in order.

    Raises:
        UserError: there are no images; or, before the first is decoded, they have different sizes.
    """
    path = Path(path)
    require_exists(path)
    require_content(path)
    if path.suffix == ".npz":
        yield from _npz_images(path, batch)
        return
    if (path / MANIFEST_NAME).exists():
        data = ImageData(path, None)
        data.require_one_size()
        for start in range(0, data.num_samples, batch):
            yield data.images(np.arange(start, min(start + batch, data.num_samples)))
        return
    left_out = Counter[str]()
    files = sorted(map(Path, walk_images(path, left_out))) if path.is_dir() else []
    del left_out[".json"]  # samples.json, which describes them
    say_left_out(path, left_out)
    if not files:
        raise UserError(
            f"{path}: no images here; give an npz, a folder of pictures or a folder of shards",
            code="evaluate.no-images",
        )
    require_one_size((str(file), image_size(partial(_head, file), str(file))) for file in files)
    for start in range(0, len(files), batch):
        yield np.stack(
            [decode_image(file.read_bytes(), str(file)) for file in files[start : start + batch]]
        )


def open_set(path: Path) -> tuple[Size, Iterator[np.ndarray]]:
    """The size (height, width) of the images of a set, all of which are checked by their headers,
    and the images as from `read_images`. Nothing but the first batch is decoded yet.

    Raises:
        UserError: as `read_images`.
    """
    images = read_images(path)
    first = next(images)
    return (first.shape[1], first.shape[2]), chain([first], images)


def require_size(path: Path, found: Size, wanted: Size | None, of: str) -> None:
    """Refuse images of another size than those that they are compared with: their features would
    differ for that reason alone.

    Args:
        wanted: None if it is unknown.
        of: what has the wanted size.

    Raises:
        UserError: code `evaluate.image-sizes`.
    """
    if wanted and found != wanted:
        raise UserError(
            f"{path}: has images of {shown(found)} pixels, but {of} {shown(wanted)}; resize them "
            "first",
            code="evaluate.image-sizes",
        )


def _head(file: Path, count: int) -> bytes:
    """The first `count` bytes of a file; -1: all."""
    with open(file, "rb") as opened:
        return opened.read(count)


def _npz_images(path: Path, batch: int) -> Iterator[np.ndarray]:
    """Stream the images: the file may be larger than the memory."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
            shape, fortran, dtype = read_npy_header(entry)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                raise UserError(
                    f"{path}: arr_0 is {dtype} {shape}, but images are uint8 (N, H, W, 3)",
                    code="evaluate.no-images",
                )
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch):
                count = min(batch, shape[0] - start)
                yield np.frombuffer(entry.read(count * size), np.uint8).reshape(count, *shape[1:])
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: is not an npz of images (arr_0): {error}", code="evaluate.no-images"
        ) from None
