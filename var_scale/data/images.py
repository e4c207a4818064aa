"""Decoding images; no torch here."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from var_scale.errors import UserError
from var_scale.files import LFS_POINTER, LFS_START

try:
    import simplejpeg
except ImportError:  # an optional extra: the same pixels as Pillow in less time
    simplejpeg = None
try:
    import pillow_heif
except ImportError:  # optional: Pillow itself does not read the photos of some phones
    pass
else:
    pillow_heif.register_heif_opener()

FIX = "; fix or remove it"
ORIENTATION = 0x0112
"""The tag of EXIF that asks viewers to rotate or mirror an image."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an orientation upright."""


@dataclass(frozen=True)
class Decoded:
    """An image as RGB in uint8, as it is stored: an EXIF orientation is not applied."""

    image: Image.Image
    format: str
    """Pillow's name of the file format"""
    orientation: int
    """of EXIF; 1: upright. Pillow itself applies that of TIFF."""

    def upright(self) -> Image.Image:
        """The image with its EXIF orientation applied, and without metadata."""
        return (
            self.image.transpose(TURNS[self.orientation]) if self.orientation != 1 else self.image
        )


def read_image(payload: bytes, where: str) -> Decoded:
    """Decode an image completely. This is the only function that decodes pixels with Pillow.

    Raises:
        UserError: it cannot be decoded, or the range of its numbers is unknown; the message begins
            with `where`.
    """
    try:
        opened = Image.open(io.BytesIO(payload))
        image = _to_rgb(opened, where)
        return Decoded(image, opened.format or "", _orientation(opened))
    except UnidentifiedImageError:
        if payload.startswith(LFS_START):
            raise UserError(f"{where} {LFS_POINTER}", code="file.lfs-pointer") from None
        raise UserError(
            f"{where} is not a readable image (unknown format){FIX}", code="data.image-invalid"
        ) from None
    except Image.DecompressionBombError as error:
        found, limit = re.findall(r"\d+", str(error))[:2]
        raise UserError(
            f"{where} has {int(found):,} pixels, more than the limit of {int(limit):,}; make it "
            "smaller, or remove it",
            code="data.image-too-large",
        ) from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # decoders raise many kinds of errors for broken files
        raise UserError(
            f"{where} is not a readable image ({error}){FIX}", code="data.image-invalid"
        ) from None


# Pillow prints this warning for images that are large and still allowed.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(payload: bytes, where: str) -> Image.Image:
    """Decode an image completely, as RGB.

    Raises:
        UserError: as in `read_image`.
    """
    return read_image(payload, where).image


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    """The image as RGB. Pillow would clip numbers of more than 8 bits at 255: 16-bit images would
    become white, and floating-point images from 0 to 1 black."""
    image.load()
    if image.mode == "F":
        return _scaled(np.asarray(image), 1, where)
    if image.mode.startswith("I"):
        grey_HW = np.asarray(image.convert("I"))
        # The mode I of a PGM file has 16 bits, but that of other formats can have 32.
        if image.mode == "I" and image.format != "PPM" and 0 < grey_HW.max() < 256:
            raise UserError(
                f"{where} has 32-bit numbers up to {grey_HW.max()}, whose range is unknown; "
                "convert it to 8 or 16 bits, or remove it",
                code="data.image-range",
            )
        return _scaled(grey_HW, 65535, where)
    return image.convert("RGB")


def _scaled(grey_HW: np.ndarray, largest: int, where: str) -> Image.Image:
    """Grey values (H, W) from 0 to `largest` as RGB.

    Raises:
        UserError: a value is outside.
    """
    low, high = grey_HW.min(), grey_HW.max()
    if not (low >= 0 and high <= largest):  # also if they are not numbers
        raise UserError(
            f"{where} has numbers from {low:g} to {high:g}, but {grey_HW.dtype} images are read "
            f"from 0 to {largest}; convert it to 8 bits, or remove it",
            code="data.image-range",
        )
    scaled_HW = (grey_HW * (255 / largest)).round().astype(np.uint8)
    return Image.fromarray(scaled_HW).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is loaded; 1 if it has none."""
    try:
        found = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata do not make the pixels unusable
        return 1
    return found if found in TURNS else 1


def decode_image(payload: bytes, where: str) -> np.ndarray:
    """Decode an image as uint8 (H, W, 3).

    Raises:
        UserError: it cannot be decoded; the message begins with `where`.
    """
    if simplejpeg and simplejpeg.is_jpeg(payload):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
            # simplejpeg has no limit; Pillow refuses more than twice this number.
            small = height * width <= 2 * (Image.MAX_IMAGE_PIXELS or height * width)
            if small and colours in ("YCbCr", "Gray"):
                return np.asarray(simplejpeg.decode_jpeg(payload))
        except ValueError:
            pass  # broken: Pillow reports the reason
    return np.array(open_image(payload, where))
