"""The sizes of images by their headers, which takes a small part of the time of decoding."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

from PIL import Image

from var_scale.data.images import open_image
from var_scale.errors import UserError

HEAD_BYTES = 1 << 16
"""Bytes from the start of a file that nearly always hold its size."""
Size = tuple[int, int]
"""Height and width in pixels."""


def image_size(read: Callable[[int], bytes], where: str) -> Size:
    """The size of an image.

    Args:
        read: returns the first bytes of its file, as many as it is asked for; -1: all.

    Raises:
        UserError: as `open_image`.
    """
    try:
        with Image.open(io.BytesIO(read(HEAD_BYTES))) as image:
            return image.height, image.width
    except Exception:  # the header is longer, or the image cannot be read: decoding names the fault
        decoded = open_image(read(-1), where)
        return decoded.height, decoded.width


def require_one_size(sizes: Iterable[tuple[str, Size]]) -> None:
    """Check that images, each with its place, have one size.

    Raises:
        UserError: code `data.image-sizes`, with the first image of another size.
    """
    first: Size | None = None
    for where, size in sizes:
        first = first or size
        if size != first:
            raise UserError(
                f"{where}: has {shown(size)} pixels, but the first image has {shown(first)}; "
                "resize the images to one size first",
                code="data.image-sizes",
            )


def shown(size: Size) -> str:
    """A size as people write it: width x height."""
    return f"{size[1]}x{size[0]}"
