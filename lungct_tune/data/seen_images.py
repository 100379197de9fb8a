"""Lists a model's training images as a small table for its bundle, and tells which other images are new to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.data.copies import WAYS, undone
from lungct_tune.data.dataset import ImageSet
from lungct_tune.data.groups import unit_vectors

SIDE = 16
"""Width and height of the stored thumbnails: enough to recognise a slice, too few to see what it shows."""

ALIKE_CORRELATION = 0.98
"""Two images are copies or of one series if the correlation of their thumbnails, in one of `WAYS`, is at least this.

A correlation of -0.98 or less is a negative. Measured on the 685 published train and valid images. JPEG of quality 20
leaves a correlation of 0.9995 or more, half the size 0.9999, a crop of 2 % 0.981 in 95 of 100. Between different groups
no pair reaches 0.967; with a flip or a turn by 180°, 0.933; with a turn by 90°, 0.872; as a negative, 0.667.
"""

_BLOCK = 1024  # images compared with all training images at the same time

SAME_FILE, ALIKE, NEW = "same file", "looks alike", "new"


def list_learned(images: ImageSet, rows: np.ndarray) -> bytes:
    """Returns a CSV: the sha256 of each image's file and its thumbnail (uint8 grey, row by row, in hexadecimal)."""
    thumbnails_ND = _thumbnails(images.images_NHW[i] for i in rows)  # one by one: they may not fit into memory
    digests = images.table["digest"].to_numpy()[rows]
    table = pd.DataFrame({"sha256": digests, "thumbnail": [row.tobytes().hex() for row in thumbnails_ND]})
    return table.drop_duplicates().to_csv(index=False).encode()


class LearnedImages:
    """The training images of a model, as `list_learned` lists them.

    Args:
        csv: the list.

    Raises:
        KeyError, ValueError, TypeError: it is another CSV.
    """

    def __init__(self, csv: bytes) -> None:
        table = pd.read_csv(BytesIO(csv), dtype=str)
        self._digests = table["sha256"].to_numpy(dtype=str)
        learned = [np.frombuffer(bytes.fromhex(row), dtype=np.uint8) for row in table["thumbnail"]]
        learned_NHW = np.array(learned, np.uint8).reshape(-1, SIDE, SIDE)
        self._learned_MD = unit_vectors(learned_NHW)

    def seen(self, images_NHW: np.ndarray, digests_N: Sequence[str] | np.ndarray) -> np.ndarray:
        """Whether each image is one of them, (N,) of `SAME_FILE`, `ALIKE` and `NEW`.

        Args:
            images_NHW: uint8 grey, of any size.
            digests_N: the sha256 of each image's file; "" where there is none.
        """
        thumbnails_NHW = _thumbnails(images_NHW).reshape(-1, SIDE, SIDE)
        likeness_N = np.zeros(len(thumbnails_NHW))
        for start in range(0, len(thumbnails_NHW), _BLOCK):
            block = slice(start, start + _BLOCK)
            for way in WAYS:
                correlation_BM = unit_vectors(undone(thumbnails_NHW[block], way)) @ self._learned_MD.T
                likeness_N[block] = np.maximum(likeness_N[block], np.abs(correlation_BM).max(axis=1, initial=0))
        same_N = np.isin(np.asarray(digests_N, dtype=str), self._digests)
        return np.select([same_N, likeness_N >= ALIKE_CORRELATION], [SAME_FILE, ALIKE], NEW)


def _thumbnails(images_NHW: Iterable[np.ndarray]) -> np.ndarray:
    """(N, SIDE * SIDE) uint8."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images_NHW]
    return np.array([np.asarray(image).ravel() for image in small], dtype=np.uint8).reshape(-1, SIDE * SIDE)
