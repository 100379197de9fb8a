"""Finds images to classify, wherever they are, and reads them one at a time. Their classes are not known."""

from __future__ import annotations

import glob
import tempfile
from collections import Counter
from collections.abc import Sequence
from errno import EACCES, ELOOP, ENOENT, EPERM
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import pyarrow.fs

from lungct_tune.config.window import Window
from lungct_tune.data.cache import default_cache, file_digest, reason_of
from lungct_tune.data.decode import decode
from lungct_tune.data.dicom_headers import pseudonyms, read_header
from lungct_tune.data.folders import DataError, listed_groups
from lungct_tune.data.grey import MOST_BYTES
from lungct_tune.data.scan import scan, why_aside
from lungct_tune.files import local_path
from lungct_tune.filesystem import StorageError, refusal, resolve_filesystem

_PLAIN = "/!$&'()*+,;=:@~"  # what a URI's path may have beside letters and digits (RFC 3986)
_FAULTS = (ENOENT, ELOOP, EACCES, EPERM)  # such as links that lead nowhere; other errors may be gone the next time
_CHUNK = 1_000_000  # bytes of a file that are fetched at a time

_pseudonyms = lru_cache(maxsize=1)(pseudonyms)


class InputImage(NamedTuple):
    """A file that should be an image."""

    source: str
    """Its path or URI."""
    group: str
    """The patient: its group in a groups.csv of the folder, or else the hash of its PatientID (DICOM), or else the
    folder that the file is in."""
    fault: str = ""
    """Why it cannot be used: a folder in its place, a name that is not UTF-8, or a header that could not be read."""
    listed_in: str = ""
    """The folder of the groups.csv that gives its group."""
    aside: str = ""
    """Why it is left aside, see `scan` and `Header`; "" if it may be an image."""


class Inputs(NamedTuple):
    """All that lies at the places that a user has named."""

    images: list[InputImage]
    left_aside: Counter[str]
    """The number of files that are not images, or no slices, by reason."""


class ReadImage(NamedTuple):
    """An image that was read."""

    image_HW: np.ndarray
    """uint8 grey, square."""
    digest: str
    """sha256 of the file."""


class Unreadable(NamedTuple):
    """A file that cannot be read as an image."""

    reason: str


def find_inputs(inputs: Sequence[str]) -> Inputs:
    """All images that are named: by a file, a folder with its subfolders, a URI of either, or a pattern with * or ?.

    A file that is named itself is always taken. In folders, documents and clutter are left aside, as `scan` does, and
    DICOM files that are no slices. A file that is named twice counts once, with its group in a groups.csv if one of
    its folders is named. Groups of one name in several files groups.csv are different patients: their folders are
    added to the names. The header of a DICOM file at a URI is not read here, so its patient is its folder.

    Raises:
        DataError: there is nothing at one of the inputs, no file is an image, a storage refuses, a groups.csv is
            malformed, or there are DICOM files and pydicom is not installed.
    """
    found: dict[str, InputImage] = {}
    aside: dict[str, str] = {}
    for name in inputs:
        for image in _images_at(name):
            if image.aside:
                aside[image.source] = image.aside
            elif image.source not in found or image.listed_in:
                found[image.source] = image
    left_aside = Counter(reason for source, reason in aside.items() if source not in found)
    if not found:
        raise DataError(f"there are no images; left aside: {', '.join(f'{n} {why}' for why, n in left_aside.items())}")
    return Inputs(_told_apart(list(found.values())), left_aside)


def _told_apart(images: list[InputImage]) -> list[InputImage]:
    """Adds the folder to the name of each listed group that is not the only one of this name."""
    places: dict[str, set[str]] = {}
    for image in images:
        places.setdefault(image.group, set()).add(image.listed_in)
    return [
        image._replace(group=f"{image.group} ({image.listed_in})")
        if image.listed_in and len(places[image.group]) > 1
        else image
        for image in images
    ]


def read_input(source: str, size: int, window: Window | None) -> ReadImage | Unreadable:
    """Reads an image from a path or a URI, as `decode` does.

    Args:
        size: its width and height in pixels, as returned.
        window: of CT values in DICOM files; None is each file's own.
    """
    place = source
    try:
        if "://" not in source:
            return ReadImage(decode(Path(source), size, window).image_HW, file_digest(Path(source)))
        filesystem, folder, name = _located(source)
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(name).suffix) as copy:
            with filesystem.open_input_stream(f"{folder}/{name}") as file:
                while copy.tell() <= MOST_BYTES and (chunk := file.read(_CHUNK)):
                    copy.write(chunk)
            copy.flush()
            place = copy.name
            return ReadImage(decode(Path(copy.name), size, window).image_HW, file_digest(Path(copy.name)))
    except Exception as error:  # Pillow's plugins and storages raise many kinds of errors
        return Unreadable(reason_of(error, place))


def _images_at(name: str) -> list[InputImage]:
    if (path := local_path(name)) is None:
        return _images_at_uri(name)
    if path.is_dir():
        return _images_in(path)
    if path.exists():
        return [_image_at(path)._replace(aside="")]
    if matches := sorted(glob.glob(str(path), recursive=True)):
        return [image for match in matches for image in _images_at(match)]
    raise DataError(f"{name}: there is no such file or folder; give image files, folders, URIs, or a pattern in quotes")


def _images_in(folder: Path) -> list[InputImage]:
    try:
        found = scan(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    if not found.files and not found.unreadable:
        raise DataError(f"{folder}: there are no images in this folder")
    paths = sorted(found.files)
    listed, images = listed_groups(folder, found.groups, paths), []
    for path in paths:
        image = _image_at(folder / path)
        if path in listed:
            name, file = listed[path]
            image = image._replace(group=name, listed_in=str((folder / file).parent))
        images.append(image)
    images += [InputImage(str(folder / path), str((folder / path).parent), why) for path, why in found.unreadable]
    others = [(path, reason) for reason, files in found.aside.items() for path in files]
    return images + [InputImage(str(folder / path), "", aside=reason) for path, reason in others]


def _images_at_uri(uri: str) -> list[InputImage]:
    try:
        filesystem, place = resolve_filesystem(uri)
        (at,) = filesystem.get_file_info([place])
        if at.type == pyarrow.fs.FileType.File:
            return [_alone(uri)]
        below = filesystem.get_file_info(pyarrow.fs.FileSelector(place, recursive=True))
    except StorageError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # fsspec's file systems raise any kind
        raise DataError(refusal(uri, "list it", error)) from error
    inside = sorted(PurePosixPath(info.path).relative_to(place).as_posix() for info in below if info.is_file)
    names = [path if _is_literal(uri) else quote(path, safe=_PLAIN) for path in inside]
    images = [
        _alone(f"{uri.rstrip('/')}/{name}")._replace(aside=why_aside(path))
        for path, name in zip(inside, names, strict=True)
    ]
    if all(image.aside for image in images):
        raise DataError(f"{uri}: there are no images")
    return images


def _is_literal(uri: str) -> bool:
    """Whether paths are in it as they are, as fsspec takes them, and not with %20 for a space and the like."""
    return uri.startswith("fsspec+")


def _image_at(path: Path) -> InputImage:
    """A file with its patient, as far as its header says it."""
    image = InputImage(str(path), str(path.parent))
    try:
        header = read_header(path, lambda kind, value: _pseudonyms(default_cache())(kind, value))
    except (OSError, MemoryError) as error:  # it may be readable by now, but not its patient
        again = "" if getattr(error, "errno", None) in _FAULTS else "; run the command again"
        return image._replace(fault=f"{reason_of(error, str(path))}{again}")
    return image._replace(group=header.patient or image.group, aside=header.aside)


def _alone(source: str) -> InputImage:
    return InputImage(source, source.rpartition("/")[0] or ".")


def _located(source: str) -> tuple[pyarrow.fs.FileSystem, str, str]:
    """The file system of a URI, the folder in it, and the file's name."""
    folder, _, name = source.rpartition("/")
    return *_resolved(folder), name if _is_literal(source) else unquote(name)


@lru_cache(maxsize=64)
def _resolved(folder: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return resolve_filesystem(folder)
