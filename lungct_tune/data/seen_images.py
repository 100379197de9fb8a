"""Lists a model's training images as a small table for its bundle, and tells which other images are new to it."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.data.copies import FLIPS
from lungct_tune.data.dataset import ImageSet
from lungct_tune.data.groups import unit_vectors

SIDE = 16
"""Width and height of the stored thumbnails: enough to recognise a slice, too few to see what it shows."""

ALIKE_CORRELATION = 0.98
"""Two images are copies or of one series if the correlation of their thumbnails, flipped or not, is at least this.

Measured on the 685 published train and valid images. JPEG of quality 20 leaves a correlation of 0.9995 or more, half
the size 0.9999, a crop of 2 % 0.981 in 95 of 100. Between different groups no pair reaches 0.967; with a flip, 0.933.
"""

_BLOCK = 1024  # images compared with all training images at the same time

SAME_FILE, ALIKE, NEW = "same file", "looks alike", "new"


def list_learned(images: ImageSet, rows: np.ndarray) -> bytes:
    """Returns a CSV: the sha256 of each image's file and its thumbnail (uint8 grey, row by row, in hexadecimal)."""
    thumbnails_ND = _thumbnails(images.images_NHW[rows])
    digests = images.table["digest"].to_numpy()[rows]
    table = pd.DataFrame({"sha256": digests, "thumbnail": [row.tobytes().hex() for row in thumbnails_ND]})
    return table.drop_duplicates().to_csv(index=False).encode()


def read_learned(learned: bytes) -> tuple[pd.Series, np.ndarray]:
    """The sha256 of each file in the CSV of `list_learned`, and the thumbnails, (N, SIDE, SIDE) uint8.

    Raises:
        KeyError, ValueError, TypeError: it is another CSV.
    """
    table = pd.read_csv(BytesIO(learned), dtype=str)
    thumbnails = [np.frombuffer(bytes.fromhex(row), dtype=np.uint8) for row in table["thumbnail"]]
    return table["sha256"], np.array(thumbnails, np.uint8).reshape(-1, SIDE, SIDE)


def seen_before(images: ImageSet, learned: bytes) -> np.ndarray:
    """Whether each image is in the CSV of `list_learned`: (N,) of `SAME_FILE`, `ALIKE` and `NEW`."""
    digests, learned_NHW = read_learned(learned)
    images_ND = unit_vectors(_thumbnails(images.images_NHW))
    correlation_N = np.full(len(images_ND), -1.0)
    for y, x in FLIPS.values():
        flipped_ND = unit_vectors(learned_NHW[:, ::y, ::x])
        for start in range(0, len(images_ND), _BLOCK):
            block = slice(start, start + _BLOCK)
            correlation_N[block] = np.maximum(correlation_N[block], (images_ND[block] @ flipped_ND.T).max(axis=1))
    same_N = images.table["digest"].isin(digests).to_numpy()
    return np.select([same_N, correlation_N >= ALIKE_CORRELATION], [SAME_FILE, ALIKE], NEW)


def _thumbnails(images_NHW: np.ndarray) -> np.ndarray:
    """(N, SIDE * SIDE) uint8."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images_NHW]
    return np.array([np.asarray(image).ravel() for image in small])
