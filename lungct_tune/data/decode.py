"""Any picture file to a square of 8-bit grey: the one place where pixels are interpreted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from lungct_tune.data.copies import PRINT

DECODER_VERSION = 1
"""Part of every cache key: raise it when the same file would come out with other pixels."""

THUMBNAIL = 64  # pixels; what chest-ctscan's series were measured at, whatever size the network sees


class FileProperties(NamedTuple):
    """What a file is, whatever it shows."""

    width: int
    height: int
    mode: str
    """As Pillow names it: "L", "RGB", "RGBA", ..."""
    format: str
    """Of the content, whatever the suffix says: "PNG", "JPEG", ..."""
    bytes: int


class Decoded(NamedTuple):
    """A picture at the sizes that are worked with, and what its file is."""

    image_HW: np.ndarray
    """uint8, as large as asked for."""
    thumbnail_HW: np.ndarray
    """uint8, `THUMBNAIL` pixels each way."""
    fingerprint_HW: np.ndarray
    """uint8, `PRINT` pixels each way."""
    properties: FileProperties
    pixel_digest: str
    """sha256 of the picture in grey, at its own size."""


def decode(path: Path, size: int) -> Decoded:
    """The image at three sizes, resized bilinearly with antialiasing, and what its file is.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file cannot be read; Pillow
            raises all of these, depending on the format and on what is wrong.
    """
    length = path.stat().st_size
    if length == 0:
        raise ValueError("empty file")
    with Image.open(path) as image:
        image.verify()  # checksums, which Pillow's PNG decoder passes over; leaves the file unusable
    with Image.open(path) as image:
        grey = to_grey(image)
        properties = FileProperties(*image.size, image.mode, image.format or "", length)
    image_HW, thumbnail_HW, fingerprint_HW = (
        np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR)) for side in (size, THUMBNAIL, PRINT)
    )
    pixel_digest = hashlib.sha256(f"{grey.size}".encode() + grey.tobytes()).hexdigest()
    return Decoded(image_HW, thumbnail_HW, fingerprint_HW, properties, pixel_digest)


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey ("L") of an image of any mode.

    Deeper modes (16-bit, 32-bit, float) are scaled linearly from their own minimum..maximum to 0..255: what
    range a file uses of what it could hold (12 of 16 bits, Hounsfield units, 0..1) is nowhere written, and
    scaling by the nominal depth would turn a 12-bit CT slice almost black. Colours become ITU-R 601 luma;
    transparency is composited over black.
    """
    if image.mode.startswith(("I", "F")):
        values_HW = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values_HW).all():
            raise ValueError("has pixels that are not finite numbers")
        low, high = values_HW.min(), values_HW.max()
        scaled_HW = (values_HW - low) * (255 / max(high - low, np.finfo(float).tiny))
        return Image.fromarray(np.round(scaled_HW).astype(np.uint8))
    grey = image.convert("L")
    if image.has_transparency_data:
        return ImageChops.multiply(grey, image.convert("RGBA").getchannel("A"))
    return grey
