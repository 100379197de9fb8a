"""Finds copies: one picture saved twice, unchanged, rescaled, recompressed, turned, flipped, shifted or re-windowed.

There are three steps, each for fewer pairs. First, hashes find identical bytes and identical pixels. Then a descriptor
that does not depend on turns by 90°, flips, shifts and the sign of the contrast finds the nearest neighbours of each
other image. Last, these pairs are aligned, and their details are correlated. Details tell a copy from the next slice of
a series: that slice has the same organs, but other vessels and other noise. Memory grows with the number of images, not
with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import fft
from scipy.ndimage import gaussian_filter

VERSION = 2
"""Part of every cache key. Raise it when a change finds other pairs in the same images."""

PRINT = 128
"""Width and height, in pixels, for comparing: enough to show the details that differ between slices of a series."""

COPY_CORRELATION = 0.94
"""Two images are copies if the correlation of their details, once aligned, is at least this.

Measured on 60 of the 685 published train and valid images and their planted copies. Of the copies rescaled to 0.3 to
1.7 times, saved as JPEG of quality 20, shifted by 5 %, or with other windows and gammas (0.6 to 1.6), 95 % reach 0.949.
Some pairs of originals were checked by eye: at 0.957 it is the same slice with a slightly different crop, at 0.919 two
neighbouring slices. Of all 683, no pair that is not a copy reaches 0.61 with a flip or a turn by 180°, 0.29 with a turn
by 90°, and 0.32 as a negative.
"""

_NEIGHBOURS = 8
"""Candidates for each image. Of 900 copies planted in the published images, 898 were the first or second neighbour."""

_COARSE, _COARSE_CORRELATION = 32, 0.75  # width and height in pixels, and the least correlation of copies at that size
_REACH = 1 / 16  # the largest shift, as a share of the width or height
_LOW = 7  # the highest frequency in the descriptor, in cycles over the width or height
_BLOCK = 512  # images or pairs in memory as float at the same time, in each thread
_THREADS = 2

WAYS = {
    "": (1, 1, False),
    "flipped left-right": (1, -1, False),
    "flipped top-bottom": (-1, 1, False),
    "turned by 180°": (-1, -1, False),
    "turned right by 90°": (1, -1, True),
    "turned left by 90°": (-1, 1, True),
    "turned right by 90° and flipped left-right": (1, 1, True),
    "turned left by 90° and flipped left-right": (-1, -1, True),
}
"""The symmetries of a square. Each is undone by these steps along rows and columns and, if True, a transposition."""


def undone(images: np.ndarray, way: str) -> np.ndarray:
    """A view of images (..., H, W) that were turned or flipped in one of the `WAYS`, as they were before."""
    y, x, is_transposed = WAYS[way]
    images = images[..., ::y, ::x]
    return images.swapaxes(-1, -2) if is_transposed else images


class Copy(NamedTuple):
    """A pair of copies, by their positions in the list that was searched."""

    first: int
    second: int
    kind: str
    """"byte-identical", "pixel-identical" (the same picture in another file) or "near-identical"."""
    similarity: float
    """The correlation that `COPY_CORRELATION` is compared with; 1 for identical images."""
    way: str = ""
    """What was done to the first image to give the second; one of `WAYS`."""
    shift: float = 0.0
    """How far the second image is shifted relative to the first: a share of the width or height, the larger one."""
    is_inverted: bool = False
    """Whether the second image is a negative of the first."""


def find_copies(fingerprints_NHW: np.ndarray, digests: Sequence[str], pixel_digests: Sequence[str]) -> list[Copy]:
    """Returns all pairs of copies. Of identical images, only the first is compared with the other images.

    Args:
        fingerprints_NHW: uint8 grey, `PRINT` pixels wide and high for images of any shape; may be memory-mapped. An
            image with a single grey value can only match identical images.
        digests: the hash of each image's file.
        pixel_digests: the hash of each image's size and pixels.
    """
    images_N = np.arange(len(fingerprints_NHW))
    same_bytes_N, same_pixels_N = (_first_alike(hashes) for hashes in (digests, pixel_digests))
    copies = [Copy(int(same_bytes_N[i]), int(i), "byte-identical", 1.0) for i in images_N[same_bytes_N != images_N]]
    in_another_file_N = (same_bytes_N == images_N) & (same_pixels_N != images_N)
    copies += [Copy(int(same_pixels_N[i]), int(i), "pixel-identical", 1.0) for i in images_N[in_another_file_N]]
    distinct = images_N[(same_bytes_N == images_N) & (same_pixels_N == images_N)]
    if len(distinct) > 1:
        copies += _near_copies(fingerprints_NHW, distinct)
    return copies


def _first_alike(hashes: Sequence[str]) -> np.ndarray:
    """For each image, the index of the first image with the same hash."""
    return pd.Series(np.arange(len(hashes))).groupby(np.asarray(hashes, dtype=object)).transform("first").to_numpy()


def _near_copies(fingerprints_NHW: np.ndarray, distinct: np.ndarray) -> list[Copy]:
    described = [_description(fingerprints_NHW[distinct[block]]) for block in _blocks(len(distinct))]
    coarse_NHW = np.concatenate([coarse_BHW for _, coarse_BHW in described])
    pairs_P2 = _neighbours(np.concatenate([description_BD for description_BD, _ in described]))

    def similar_of(block: slice) -> list[tuple[int, int, int]]:
        left, right = pairs_P2[block].T
        by_way_WP = np.stack([_aligned(coarse_NHW[left], undone(coarse_NHW[right], way))[0] for way in WAYS])
        kept = np.flatnonzero(by_way_WP.max(axis=0) >= _COARSE_CORRELATION)
        return list(zip(left[kept], right[kept], by_way_WP.argmax(axis=0)[kept], strict=True))

    with ThreadPoolExecutor(_THREADS) as threads:
        similar = [pair for pairs in threads.map(similar_of, _blocks(len(pairs_P2))) for pair in pairs]

    copies = []
    for block in _blocks(len(similar), _BLOCK // 4):
        left, right, way_P = np.array(similar[block]).T
        first, second = distinct[left], distinct[right]
        here, at = np.unique(np.concatenate([first, second]), return_inverse=True)
        detail_NHW = _detail(_equalised(fingerprints_NHW[here]), 1.0)
        ways = [list(WAYS)[way] for way in way_P]
        other_PHW = np.stack([undone(detail_NHW[i], way) for i, way in zip(at[len(first) :], ways, strict=True)])
        similarity_P, shift_P, is_inverted_P = _aligned(detail_NHW[at[: len(first)]], other_PHW)
        copies += [
            Copy(
                int(i),
                int(j),
                "near-identical",
                round(float(similarity), 4),
                way,
                round(float(shift), 3),
                bool(is_inverted),
            )
            for i, j, similarity, way, shift, is_inverted in zip(
                first, second, similarity_P, ways, shift_P, is_inverted_P, strict=True
            )
            if similarity >= COPY_CORRELATION
        ]
    return copies


def _blocks(n: int, size: int = _BLOCK) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def _description(fingerprints_BHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors for the search for neighbours, (B, D), and the details at `_COARSE` pixels.

    Shifts and negatives do not change the amplitudes of the Fourier transform. A flip exchanges those of (u, v) and
    (u, -v), a transposition those of (u, v) and (v, u), and a turn by 90° does both. So the descriptor has the absolute
    sums and differences of all four.
    """
    equalised_BHW = _equalised(fingerprints_BHW)
    half_BHW = _pooled(equalised_BHW, PRINT // 2)
    half_BHW -= half_BHW.mean(axis=(1, 2), keepdims=True)
    amplitudes_BHW = np.sqrt(np.abs(fft.rfft2(half_BHW * _taper(PRINT // 2))))
    down_BHW, up_BHW = amplitudes_BHW[:, : _LOW + 1, : _LOW + 1], amplitudes_BHW[:, -np.arange(_LOW + 1), : _LOW + 1]
    rows, columns = np.triu_indices(_LOW + 1)
    described = [
        np.abs(mixed_BHW[:, rows, columns] + sign * mixed_BHW[:, columns, rows])
        for mixed_BHW in (down_BHW + up_BHW, down_BHW - up_BHW)
        for sign in (1, -1)
    ]
    coarse_BHW = _detail(_pooled(equalised_BHW, _COARSE), 0.5)
    return np.concatenate(described, axis=1).astype(np.float32), coarse_BHW


def _neighbours(descriptions_ND: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) in which one image is a nearest neighbour of the other, each pair once."""
    from sklearn.neighbors import NearestNeighbors  # takes seconds, and is not needed to read an experiment

    vectors_ND = descriptions_ND - descriptions_ND.mean(axis=0)
    vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    n = len(vectors_ND)
    search = NearestNeighbors(n_neighbors=min(_NEIGHBOURS + 1, n), algorithm="brute").fit(vectors_ND)
    found = search.kneighbors(return_distance=False, X=vectors_ND)
    pairs_P2 = np.stack([np.repeat(np.arange(n), found.shape[1]), found.ravel()], axis=1)
    pairs_P2 = np.sort(pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]], axis=1)
    return np.unique(pairs_P2, axis=0)


def _equalised(images_NHW: np.ndarray) -> np.ndarray:
    """Grey values replaced by their ranks, -0.5 to 0.5. Windows and gammas that keep the order change nothing."""
    equalised_NHW = np.empty(images_NHW.shape, dtype=np.float32)
    for i, image_HW in enumerate(images_NHW):
        counts = np.bincount(image_HW.ravel(), minlength=256)
        equalised_NHW[i] = ((counts.cumsum() - counts / 2) / image_HW.size - 0.5)[image_HW]
    return equalised_NHW


def _pooled(images_NHW: np.ndarray, side: int) -> np.ndarray:
    n, _, width = images_NHW.shape
    return np.asarray(images_NHW.reshape(n, side, width // side, side, width // side).mean(axis=(2, 4)))


def _taper(side: int) -> np.ndarray:
    """Weights that fade an image out towards its edges, since a shift brings in other content there."""
    fade = np.sqrt(np.hanning(side + 2)[1:-1]).astype(np.float32)
    return np.outer(fade, fade)


def _detail(equalised_NHW: np.ndarray, scale: float) -> np.ndarray:
    """Structures of about `scale` to 4 `scale` pixels, contrast-normalised locally, tapered, scaled to length 1."""
    fine_NHW, coarse_NHW = (gaussian_filter(equalised_NHW, (0, sigma, sigma)) for sigma in (scale, 4 * scale))
    detail_NHW = fine_NHW - coarse_NHW
    strength_NHW = np.sqrt(gaussian_filter(detail_NHW**2, (0, 8 * scale, 8 * scale)))
    floor_N11 = 0.3 * strength_NHW.mean(axis=(1, 2), keepdims=True)  # does not amplify noise in flat regions
    detail_NHW /= np.maximum(strength_NHW + floor_N11, 1e-6)
    detail_NHW *= _taper(detail_NHW.shape[1])
    return np.asarray(detail_NHW / np.maximum(np.linalg.norm(detail_NHW, axis=(1, 2), keepdims=True), 1e-6))


def _aligned(left_PHW: np.ndarray, right_PHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The highest correlation of each pair over all shifts up to `_REACH`, the shift, and whether a negative gives it.

    The convolution theorem gives all shifts at once. A parabola through the highest point and its neighbours gives the
    correlation between pixels.
    """
    side = left_PHW.shape[1]
    reach = int(side * _REACH) + 1
    # Not with workers=2: a process that is forked meanwhile, as Ray's are, makes SciPy's threads raise an error.
    product = fft.rfft2(left_PHW) * fft.rfft2(right_PHW).conj()
    everywhere_PHW = fft.fftshift(fft.irfft2(product, s=left_PHW.shape[1:]), axes=(1, 2))
    middle, pairs = side // 2, np.arange(len(left_PHW))
    around_PHW = everywhere_PHW[:, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    inner_PHW = around_PHW[:, 1:-1, 1:-1]
    is_inverted = -inner_PHW.min(axis=(1, 2)) > inner_PHW.max(axis=(1, 2))
    around_PHW[is_inverted] *= -1
    y, x = np.unravel_index(inner_PHW.reshape(len(pairs), -1).argmax(axis=1), inner_PHW.shape[1:])
    peak = around_PHW[pairs, y + 1, x + 1]
    higher = np.zeros_like(peak)
    for before, after in (
        (around_PHW[pairs, y, x + 1], around_PHW[pairs, y + 2, x + 1]),
        (around_PHW[pairs, y + 1, x], around_PHW[pairs, y + 1, x + 2]),
    ):
        bend = 2 * peak - before - after
        higher += np.where(
            (bend > 0) & (peak >= np.maximum(before, after)), (after - before) ** 2 / (8 * np.maximum(bend, 1e-9)), 0
        )
    shift = np.maximum(np.abs(y + 1 - reach), np.abs(x + 1 - reach)) / side
    return np.minimum(peak + higher, 1.0), shift, is_inverted
