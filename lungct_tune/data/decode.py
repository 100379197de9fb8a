"""Decodes an image file to a square 8-bit grey image."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lungct_tune.data.copies import PRINT
from lungct_tune.data.grey import read_grey
from lungct_tune.files import open_file

DECODER_VERSION = 2
"""Part of every cache key. Raise it when a change gives other pixels for the same file."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
"""The formats that are opened. Pillow knows others; for some of them, such as EPS, it starts programs."""

MOST_PIXELS = 20_000_000
"""Of an image's file. CT slices have a quarter of a million; a small compressed file can hold very many more."""

MEMORY = 400_000_000
"""Bytes that decoding one image may take, at most."""

MOST_BYTES = 500_000_000
"""Of an image's file."""

PLAIN = 0.999
"""An image is without content if at least this share of its pixels has one grey value."""

THUMBNAIL = 64  # pixels; at this size the series of chest-ctscan were measured; the network's input size is separate


class FileProperties(NamedTuple):
    """Properties of an image file, independent of what it shows."""

    width: int
    height: int
    mode: str
    """How pixels are stored, see `lungct_tune.data.grey.Grey`: "L", "RGB", "RGB;16", "L turned", ..."""
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
    is_plain: bool
    """Whether nearly all pixels have one grey value, see `PLAIN`."""


def decode(path: Path, size: int) -> Decoded:
    """Decodes the image at three sizes, resized bilinearly with antialiasing.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: the file cannot be read; Pillow
            raises all of these, depending on the format and on the fault.
    """
    with open_file(path, MOST_BYTES) as file:
        length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise ValueError("empty file")
    with open_image(path) as image:
        image.verify()  # checks checksums, which Pillow's PNG decoder skips; the file must then be opened again
    with open_image(path) as image:
        grey, mode = read_grey(image)
        properties = FileProperties(*grey.size, mode, image.format or "", length)
    image_HW, thumbnail_HW, fingerprint_HW = (
        np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR)) for side in (size, THUMBNAIL, PRINT)
    )
    pixel_digest = hashlib.sha256(f"{grey.size}".encode())
    pixel_digest.update(grey.tobytes())
    is_plain = max(grey.histogram()) >= PLAIN * grey.width * grey.height
    return Decoded(image_HW, thumbnail_HW, fingerprint_HW, properties, pixel_digest.hexdigest(), is_plain)


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
