"""Reads a folder of CT slices into one array, with labels, groups and a split that does not leak."""

from lungct_tune.data.copies import COPY_CORRELATION
from lungct_tune.data.dataset import ImageSet, read_images
from lungct_tune.data.folders import DataError
from lungct_tune.data.groups import SERIES_CORRELATION, groups_by_likeness
from lungct_tune.data.phantoms import make_phantoms
from lungct_tune.data.remote import fetch_images
from lungct_tune.data.split import SPLITS, fold_images, group_overlap, split_images

__all__ = [
    "COPY_CORRELATION",
    "SERIES_CORRELATION",
    "SPLITS",
    "DataError",
    "ImageSet",
    "fetch_images",
    "fold_images",
    "group_overlap",
    "groups_by_likeness",
    "make_phantoms",
    "read_images",
    "split_images",
]
