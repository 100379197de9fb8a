"""Decodes an image file to a square 8-bit grey image."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lungct_tune.config.window import Window
from lungct_tune.data.copies import PRINT
from lungct_tune.data.dicom import is_dicom, read_dicom
from lungct_tune.data.grey import MOST_BYTES, MOST_PIXELS, read_grey
from lungct_tune.files import open_file

DECODER_VERSION = 4
"""Part of every cache key. Raise it when a change gives other pixels for the same file."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
"""The formats that Pillow opens, beside DICOM. It knows others; for some of them, such as EPS, it starts programs."""

RESIZING = "bilinear with antialiasing (Pillow's BILINEAR), to a square whatever the proportions"
"""How `decode` resizes, for those who use a model without this package."""

MEMORY = 400_000_000
"""Bytes that decoding one image may take, at most."""

PLAIN = 0.999
"""An image is without content if at least this share of its pixels has one grey value."""

THUMBNAIL = 64  # pixels; at this size the series of chest-ctscan were measured; the network's input size is separate


class FileProperties(NamedTuple):
    """Properties of an image file, independent of what it shows."""

    width: int
    height: int
    mode: str
    """How pixels are stored, see `lungct_tune.data.grey.Grey`: "L", "RGB", "RGB;16", "L turned", ...; see also
    `lungct_tune.data.dicom.read_dicom`: "MONOCHROME2;12", ..."""
    format: str
    """Read from the content, not from the suffix: "PNG", "JPEG", "DICOM", ..."""
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


def decode(path: Path, size: int, window: Window | None = None) -> Decoded:
    """Decodes the image at three sizes, resized bilinearly with antialiasing.

    Args:
        path: the file; its content says which format it has.
        size: width and height in pixels of the image for the network.
        window: of CT values in DICOM files; None is each file's own.

    Raises:
        OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError: the file cannot be read; Pillow
            raises all of these, depending on the format and on the fault.
        DataError: it is DICOM, and pydicom is not installed.
    """
    with open_file(path, MOST_BYTES) as file:
        length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise ValueError("empty file")
    grey, mode, format = read_file(path, window)
    properties = FileProperties(*grey.size, mode, format, length)
    image_HW, thumbnail_HW, fingerprint_HW = (
        np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR)) for side in (size, THUMBNAIL, PRINT)
    )
    pixel_digest = hashlib.sha256(f"{grey.size}".encode())
    pixel_digest.update(grey.tobytes())
    is_plain = max(grey.histogram()) >= PLAIN * grey.width * grey.height
    return Decoded(image_HW, thumbnail_HW, fingerprint_HW, properties, pixel_digest.hexdigest(), is_plain)


def read_file(path: Path, window: Window | None = None) -> tuple[Image.Image, str, str]:
    """The image in a file as 8-bit grey at its own size, how it is stored, and its format; raises as `decode` does."""
    if is_dicom(path):
        return *read_dicom(path, window), "DICOM"
    with open_image(path) as image:
        image.verify()  # checks checksums, which Pillow's PNG decoder skips; the file must then be opened again
    with open_image(path) as image:
        return *read_grey(image), image.format or ""


def open_image(path: Path) -> Image.Image:
    """Opens a file of one of the `FORMATS` with at most `MOST_PIXELS`; its pixels are not decoded yet.

    Raises:
        OSError, ValueError: it is not one.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}, DICOM") from error
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} pixels are decoded")
    return image
