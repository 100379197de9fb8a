"""Groups the images that must stay together: copies and neighbouring slices would leak across a split.

The published data have no patient identifiers, so a series is recognised by the similarity of its slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SERIES_CORRELATION = 0.90
"""Two slices are of one series if the correlation of their thumbnails is at least this.

On the 685 published train and valid images this gives 467 groups; the largest has 36 images. One pair has different
classes, apart from the byte-identical pair. At 0.85 some slices are similar by chance (11 such pairs).
"""

CORRELATIONS = (0.80, 0.85, SERIES_CORRELATION, 0.95, 0.98)
"""Thresholds at which the groups are counted, to show how much depends on the one that is used."""

_BLOCK = 2048  # images compared with as many others at once: 16 MB of correlations


def unit_vectors(images_NHW: np.ndarray) -> np.ndarray:
    """Images as vectors of mean 0 and length 1, (N, D) float32: dot products are Pearson correlations.

    An image with a single grey value becomes a vector of zeros, which correlates with nothing.
    """
    vectors_ND = images_NHW.reshape(len(images_NHW), int(np.prod(images_NHW.shape[1:]))).astype(np.float32)
    vectors_ND -= vectors_ND.mean(axis=1, keepdims=True)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1))


def groups_by_likeness(thumbnails_NHW: np.ndarray, digests: Sequence[str]) -> dict[float, np.ndarray]:
    """Groups images that have the same bytes, or whose pixels have a Pearson correlation of at least a threshold.

    Groups are connected components: images A and C are in one group if both are similar to B.

    Args:
        thumbnails_NHW: uint8, all of one size; `read_images` gives 64 by 64.
        digests: the hash of each image's file. An image with a single grey value is grouped only with its byte copies.

    Returns:
        For each of `CORRELATIONS`, the group of each image, (N,) int, numbered from 0 in the order of appearance.
    """
    groups = dict.fromkeys(CORRELATIONS, pd.factorize(np.asarray(digests, dtype=object))[0])
    starts = range(0, len(thumbnails_NHW), _BLOCK)
    for start in starts:
        rows_ND = unit_vectors(thumbnails_NHW[start : start + _BLOCK])
        for other in (other for other in starts if other >= start):
            columns_ND = unit_vectors(thumbnails_NHW[other : other + _BLOCK])
            correlations = rows_ND @ columns_ND.T
            for threshold in CORRELATIONS:
                # Merged block by block, so that memory stays linear even if all images are similar.
                rows, columns = np.nonzero(correlations >= threshold)
                left, right = groups[threshold][start + rows], groups[threshold][other + columns]
                if (is_new := left != right).any():
                    groups[threshold] = merge(groups[threshold], start + rows[is_new], other + columns[is_new])
    return groups


def join_groups(groups_N: np.ndarray, known: Sequence[str | None]) -> np.ndarray:
    """Joins the groups in `groups_N` whose images share a known group; None means that the group is unknown."""
    known_N = pd.factorize(np.asarray(known, dtype=object))[0]  # None becomes -1
    images = np.flatnonzero(known_N >= 0)
    first_image = pd.Series(images).groupby(known_N[images]).transform("first").to_numpy(dtype=np.intp)
    return merge(groups_N, images, first_image)


def label_conflicts(copies_N: np.ndarray, labels: Sequence[str]) -> list[np.ndarray]:
    """The image indices of each set of copies that is filed under several classes.

    Args:
        copies_N: images with the same number are copies of one another.
        labels: the class of each image.
    """
    n_labels = pd.Series(labels).groupby(copies_N).nunique()
    return [np.flatnonzero(copies_N == number) for number in n_labels.index[n_labels > 1]]


def merge(groups_N: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The group of each image after joining the groups of images `left[i]` and `right[i]` for each i."""
    n = groups_N.max(initial=-1) + 1
    graph = coo_array((np.ones(len(left), dtype=bool), (groups_N[left], groups_N[right])), shape=(n, n))
    component_of_group = connected_components(graph, directed=False)[1]
    return np.asarray(pd.factorize(component_of_group[groups_N])[0])
