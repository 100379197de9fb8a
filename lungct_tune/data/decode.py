"""Decodes an image file to a square 8-bit grey image. Pixels are interpreted only here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from lungct_tune.data.copies import PRINT

DECODER_VERSION = 1
"""Part of every cache key. Raise it when a change gives other pixels for the same file."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
"""The formats that are opened. Pillow knows others; for some of them, such as EPS, it starts programs."""

MOST_PIXELS = 20_000_000
"""Of an image's file. CT slices have a quarter of a million; a small compressed file can hold very many more."""

MEMORY = 400_000_000
"""Bytes that decoding one image may take, at most."""

_BLOCK = 1_000_000  # values that are scaled at a time

THUMBNAIL = 64  # pixels; at this size the series of chest-ctscan were measured; the network's input size is separate


class FileProperties(NamedTuple):
    """Properties of an image file, independent of what it shows."""

    width: int
    height: int
    mode: str
    """Pillow's name: "L", "RGB", "RGBA", ..."""
    format: str
    """Read from the content, not from the suffix: "PNG", "JPEG", ..."""
    bytes: int


class Decoded(NamedTuple):
    """An image at the sizes that the program uses, and the properties of its file."""

    image_HW: np.ndarray
    """uint8, at the size given to `decode`."""
    thumbnail_HW: np.ndarray
    """uint8, `THUMBNAIL` pixels wide and high."""
    fingerprint_HW: np.ndarray
    """uint8, `PRINT` pixels wide and high."""
    properties: FileProperties
    pixel_digest: str
    """sha256 of the grey image at its original size."""


def decode(path: Path, size: int) -> Decoded:
    """Decodes the image at three sizes, resized bilinearly with antialiasing.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file cannot be read; Pillow
            raises all of these, depending on the format and on the fault.
    """
    length = path.stat().st_size
    if length == 0:
        raise ValueError("empty file")
    with open_image(path) as image:
        image.verify()  # checks checksums, which Pillow's PNG decoder skips; the file must then be opened again
    with open_image(path) as image:
        grey = to_grey(image)
        properties = FileProperties(*image.size, image.mode, image.format or "", length)
    image_HW, thumbnail_HW, fingerprint_HW = (
        np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR)) for side in (size, THUMBNAIL, PRINT)
    )
    pixel_digest = hashlib.sha256(f"{grey.size}".encode())
    pixel_digest.update(grey.tobytes())
    return Decoded(image_HW, thumbnail_HW, fingerprint_HW, properties, pixel_digest.hexdigest())


def open_image(path: Path) -> Image.Image:
    """Opens a file of one of the `FORMATS` with at most `MOST_PIXELS`; its pixels are not decoded yet.

    Raises:
        OSError, ValueError: it is not one.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} pixels are decoded")
    return image


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey ("L") of an image of any mode.

    Deeper modes (16-bit, 32-bit, float) are scaled linearly from the image's minimum..maximum to 0..255. A file does
    not record which range it uses (12 of 16 bits, Hounsfield units, 0..1), and scaling by the nominal depth would turn
    a 12-bit CT slice almost black. Colours become ITU-R 601 luma. Transparency is composited over black.
    """
    if image.mode.startswith(("I", "F")):
        values_M = np.asarray(image).ravel()
        low, high = float(values_M.min()), float(values_M.max())  # not a number if any value is not
        if not np.isfinite([low, high]).all():
            raise ValueError("has pixels that are not finite numbers")
        factor = 255 / max(high - low, np.finfo(float).tiny)
        grey_M = np.empty(values_M.size, np.uint8)
        for start in range(0, values_M.size, _BLOCK):  # in blocks, because float64 takes eight times the memory
            block = slice(start, start + _BLOCK)
            grey_M[block] = np.round((values_M[block].astype(np.float64) - low) * factor)
        return Image.fromarray(grey_M.reshape(image.height, image.width))
    grey = image.convert("L")
    if image.has_transparency_data:
        return ImageChops.multiply(grey, image.convert("RGBA").getchannel("A"))
    return grey
