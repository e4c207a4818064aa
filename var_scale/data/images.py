"""Decoding images; no torch here."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from var_scale.errors import UserError

try:
    import simplejpeg
except ImportError:  # an extra: the same pixels as Pillow, faster
    simplejpeg = None


def open_image(payload: bytes, where: str) -> Image.Image:
    """An encoded image as RGB, wholly decoded. UserError that begins with `where` if it cannot be."""
    try:
        return Image.open(io.BytesIO(payload)).convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{where} is not a readable image (unknown format); mend or remove it") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders meet broken files with many errors
        raise UserError(f"{where} is not a readable image ({error}); mend or remove it") from None


def decode_image(payload: bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 (H, W, 3). UserError that begins with `where` if it cannot be decoded."""
    if simplejpeg and simplejpeg.is_jpeg(payload):
        try:
            if simplejpeg.decode_jpeg_header(payload)[2] in ("YCbCr", "Gray"):
                return np.asarray(simplejpeg.decode_jpeg(payload))
        except ValueError:
            pass  # broken: Pillow says how
    return np.array(open_image(payload, where))
