"""Reads a data set for training: pixels, classes, groups, and the files that were left out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lungct_tune.config.window import Window
from lungct_tune.data.cache import decode_all, default_cache, file_digest
from lungct_tune.data.class_names import LONGEST_NAME, MOST_CLASSES
from lungct_tune.data.decode import DECODER_VERSION, FileProperties
from lungct_tune.data.dicom_headers import pseudonyms, read_headers
from lungct_tune.data.folders import DataError, Found, LeftAside, count_aside, find_images, first_lines, scan_folder
from lungct_tune.data.groups import join_groups, merge
from lungct_tune.data.image_table import find_listed
from lungct_tune.errors import number_of

_READ_AS_EVER = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class CopyOf(NamedTuple):
    """Two images that are copies; see `Copy` for the last five fields."""

    path: str
    other: str
    class_name: str
    other_class: str
    kind: str
    similarity: float
    way: str
    shift: float
    is_inverted: bool


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All usable images of one folder; row i of `table` describes `images_NHW[i]`."""

    root: Path
    table: pd.DataFrame
    """One row per image: path (relative to root, with forward slashes), folder ("train", "valid", "test" or ""
    as published), label (index into classes), digest (sha256 of the file), group (images of one group must
    stay in one part of the split), is_listed (whether groups.csv, a table or a split file gives its group), has_patient
    (whether its PatientID does, in DICOM), and the fields of `FileProperties`."""
    images_NHW: np.ndarray
    """uint8 grey, square, memory-mapped, read-only."""
    classes: tuple[str, ...]
    """Display names in the order of the labels, which is alphabetical."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of each file that could not be decoded, and of each folder that could not be opened."""
    conflicts: list[tuple[str, ...]]
    """Paths of copies that are filed under different classes. They are not in the table."""
    copies: list[CopyOf]
    """Pairs of copies, including the conflicts."""
    group_counts: list[tuple[float, int]]
    """(threshold, groups): the number of groups at each similarity threshold, without groups.csv."""
    fingerprint: str
    """sha256 of all that identifies the data: content, classes, groups, paths and size."""
    without_content: tuple[str, ...] = ()
    """Paths of images in the table in which nearly all pixels have one grey value."""
    left_aside: tuple[LeftAside, ...] = ()
    """The files in the folder that are no images, by reason."""

    @property
    def is_known_N(self) -> np.ndarray:
        """(N,) bool: whether an image's patient is known; the group of the others was found by likeness."""
        return (self.table["is_listed"] | self.table["has_patient"]).to_numpy(dtype=bool)

    @property
    def patients_known(self) -> bool:
        """Whether the patients of all images are known, so that a grouped split has parted them."""
        return bool(self.is_known_N.all())

    def copy_numbers(self) -> np.ndarray:
        """(N,) int: images with the same number are copies of one another."""
        row_of = {path: row for row, path in enumerate(self.table["path"])}
        pairs = [(row_of[c.path], row_of[c.other]) for c in self.copies if c.path in row_of and c.other in row_of]
        return merge(np.arange(len(row_of)), *np.array(pairs, dtype=np.intp).reshape(-1, 2).T)


def read_images(
    root: Path,
    size: int,
    *,
    class_map: Mapping[str, str] | None = None,
    check_map: bool = True,
    skip_unreadable: bool = False,
    cache: Path | None = None,
    progress: bool = True,
    table: Path | None = None,
    window: Window | None = None,
    fewest_classes: int = 2,
) -> ImageSet:
    """Finds, decodes and groups the images in `root`. Images that were read before come from the cache.

    Args:
        root: a folder in a layout that `find_images` accepts; groups.csv is optional (see `listed_groups`).
        size: width and height of the decoded images in pixels.
        class_map: the class of each folder whose name is not one of the four classes.
        check_map: refuse a class map with a key that matches nothing. A search may have started with one.
        skip_unreadable: leave out files that cannot be decoded instead of raising.
        cache: where decoded images are kept; $XDG_CACHE_HOME/lungct_tune or ~/.cache/lungct_tune by default.
        progress: show a bar while decoding, if stderr is a terminal.
        table: a CSV of the images and their classes, see `find_listed`; `root` then needs no class folders.
        window: of CT values in DICOM files; None is each file's own.
        fewest_classes: of how many classes there must be images.

    Raises:
        DataError: the folder's layout, a class name, groups.csv, the table, a file or the cache is not usable, or there
            are DICOM files and pydicom is not installed.
    """
    cache = cache or default_cache()
    in_folder, sources = _find(root, class_map, table, cache, progress, fewest_classes)
    if in_folder.unmatched and check_map:
        raise DataError(
            f"{in_folder.unmatched}. Correct --class-map (for evaluate: --map), or class_map in the settings"
        )
    files = in_folder.files
    digests, labels = [source.digest for source in sources], [file.class_name for file in files]
    paths = [root / file.path for file in files]
    images_NHW, found = decode_all(paths, digests, labels, size, window, cache, progress)

    unreadable = in_folder.unreadable + [(files[i].path, reason) for i, reason in found.unreadable]
    if unreadable and not skip_unreadable:
        raise DataError(
            f"{number_of(len(unreadable), 'file')} in {root} cannot be read as images:\n"
            f"{first_lines([f'{path}: {reason}' for path, reason in unreadable])}\n"
            "Repair or remove them, or leave them out with --skip-unreadable"
        )
    classes = tuple(sorted(set(labels)))
    if len(classes) < fewest_classes:
        few = "fewer than two classes" if classes else "no class"
        raise DataError(
            f"without the {number_of(len(unreadable), 'file')} that cannot be read, {root} has images of {few}; "
            f"repair or rename {unreadable[0][0]}"
        )
    if len(classes) > MOST_CLASSES or len(longest := max(classes, key=len)) > LONGEST_NAME:
        wrong = f"{len(classes)} classes" if len(classes) > MOST_CLASSES else f"the class {longest!r}"
        raise DataError(
            f"{root} has {wrong}; a model has at most {MOST_CLASSES} classes, with names of at most {LONGEST_NAME} "
            "characters: rename the folders, or name their classes with --class-map (for evaluate: --map)"
        )
    rows = pd.DataFrame(
        {
            "path": [files[i].path for i in found.kept],
            "folder": [files[i].folder for i in found.kept],
            "label": [classes.index(labels[i]) for i in found.kept],
            "digest": [digests[i] for i in found.kept],
            "group": join_groups(np.array(found.groups, dtype=np.intp), [sources[i].group for i in found.kept]),
        }
    )
    # the files that version 1 of the decoder read in the same way keep their fingerprint, so that a search can go on
    version = 1 if {file.mode for file in found.properties} <= _READ_AS_EVER else DECODER_VERSION
    windowed = f" {window}" if window and any(file.format == "DICOM" for file in found.properties) else ""
    identity = f"{version} {size} {classes}{windowed}\n{rows.to_csv(index=False)}"
    rows["is_listed"] = [sources[i].is_listed for i in found.kept]
    rows["has_patient"] = [sources[i].group is not None and not sources[i].is_listed for i in found.kept]
    rows = pd.concat([rows, pd.DataFrame(found.properties, columns=FileProperties._fields)], axis=1)
    if lost := [name for label, name in enumerate(classes) if label not in rows["label"].to_numpy()]:
        raise DataError(
            f"no usable image of {', '.join(lost)} is left in {root}: "
            f"unreadable: {number_of(len(unreadable), 'file')}; with a copy under another class: "
            f"{number_of(sum(map(len, found.conflicts)), 'file')}"
        )
    copies = [
        CopyOf(files[pair.first].path, files[pair.second].path, labels[pair.first], labels[pair.second], *pair[2:])
        for pair in found.copies
    ]
    return ImageSet(
        root=root,
        table=rows,
        images_NHW=images_NHW,
        classes=classes,
        unreadable=unreadable,
        conflicts=[tuple(files[i].path for i in twins) for twins in found.conflicts],
        copies=copies,
        group_counts=found.group_counts,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        without_content=tuple(files[i].path for i in found.plain),
        left_aside=tuple(in_folder.left_aside),
    )


class _Source(NamedTuple):
    """What is known of an image before it is decoded."""

    digest: str
    """sha256 of its file; "" if the file or its DICOM header could not be read."""
    group: str | None
    """As the user lists it, or else the hash of its PatientID; None if it is not known."""
    is_listed: bool
    """Whether the user lists its group."""


def _find(
    root: Path,
    class_map: Mapping[str, str] | None,
    table: Path | None,
    cache: Path,
    progress: bool,
    fewest_classes: int,
) -> tuple[Found, list[_Source]]:
    """Finds the images in a data folder, and what is known of each; leaves DICOM files aside that are no slices."""
    if table is None:
        found = find_images(root, class_map, fewest_classes)
        digests = _digests(root, [file.path for file in found.files])
        headers = read_headers(root, digests, cache, progress)
    else:
        all_files = scan_folder(root)
        digests = _digests(root, all_files.files)
        headers = read_headers(root, digests, cache, progress)
        found = find_listed(root, table, all_files, headers, pseudonyms(cache), class_map, fewest_classes)
    aside: dict[str, list[str]] = {}
    for path in (file.path for file in found.files if file.path in headers):
        if (header := headers[path]) is None:
            digests[path] = ""  # nobody knows whose image it is: it counts as unreadable, see `decode_all`
        elif header.aside:
            aside.setdefault(header.aside, []).append(path)
    files = [file for file in found.files if not ((header := headers.get(file.path)) and header.aside)]
    if lost := {file.class_name for file in found.files} - {file.class_name for file in files}:
        raise DataError(
            f"no image of {', '.join(sorted(lost))} is left in {root}: its files are {' and '.join(sorted(aside))}"
        )
    # 12.0 is how pandas writes a 12 in a column that once had gaps
    listed = {path: re.sub(r"^(\d+)\.0$", r"\1", name) for path, name in found.groups.items()}
    sources = []
    for path in (file.path for file in files):
        header = headers.get(path)
        patient = header.patient if header else ""
        sources.append(_Source(digests[path], listed.get(path) or patient or None, path in listed))
    return found._replace(files=files, left_aside=found.left_aside + count_aside(aside)), sources


def _digests(root: Path, paths: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(file_digest, (root / path for path in paths)), strict=True))
