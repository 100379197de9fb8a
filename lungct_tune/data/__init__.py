"""From a folder of CT slices to one array, its labels, its groups and a split that does not leak."""

from lungct_tune.data.copies import COPY_CORRELATION
from lungct_tune.data.find import DataError
from lungct_tune.data.groups import SERIES_CORRELATION, near_identical_groups
from lungct_tune.data.images import ImageSet, read_images
from lungct_tune.data.phantoms import make_phantoms
from lungct_tune.data.remote import fetch_images
from lungct_tune.data.split import SPLITS, fold_images, split_images, twins_across

__all__ = [
    "COPY_CORRELATION",
    "SERIES_CORRELATION",
    "SPLITS",
    "DataError",
    "ImageSet",
    "fetch_images",
    "fold_images",
    "make_phantoms",
    "near_identical_groups",
    "read_images",
    "split_images",
    "twins_across",
]
