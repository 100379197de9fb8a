"""Reads a folder of CT slices into one array, with labels, groups and a split that does not leak."""

from lungct_tune.data.dataset import ImageSet, read_images
from lungct_tune.data.folders import DataError
from lungct_tune.data.phantoms import make_phantoms
from lungct_tune.data.remote import fetch_images
from lungct_tune.data.split import SPLITS, fold_images, group_overlap, split_images

__all__ = [
    "SPLITS",
    "DataError",
    "ImageSet",
    "fetch_images",
    "fold_images",
    "group_overlap",
    "make_phantoms",
    "read_images",
    "split_images",
]
