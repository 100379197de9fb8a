"""Finds the image files, their classes and their known groups, without opening an image.

Copies of the Kaggle data set name and nest their folders differently. This module knows the variants. It refuses a
folder name that it does not know, since a guessed class would be a guessed diagnosis. All that lies in the data folder
is used, or named with a reason.
"""

from __future__ import annotations

import csv
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from lungct_tune.data.class_names import (
    CANONICAL_CLASSES,
    beginnings,
    class_inside,
    class_of_folder,
    composed,
    spellings_of,
    unmatched_keys,
)
from lungct_tune.data.scan import DOCUMENTS, OTHER_FORMATS, OUTSIDE, Scan, scan
from lungct_tune.errors import UserError, number_of
from lungct_tune.files import read_text

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}

_NO_PICTURES = {
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"),
    *(".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl", ".pt", ".pth", ".safetensors", ".onnx", ".parquet"),
    *(".mp4", ".avi", ".mov", ".exe", ".dll", ".jar"),
}
"""Files that lie beside class folders without a fault. Inside a class folder they may hold slices, and are reported."""

_COLUMNS = {name.lower(): name for name in ("path", "class", "group", "split", "patient_known", "SeriesInstanceUID")}

_LISTED = 20  # files or folders that an error message names; it only counts the others


class DataError(UserError):
    """The data cannot be used as they are; the message says which files, why, and what to do."""


class ImageFile(NamedTuple):
    """A file that should be an image, with the split and the class that its folders give."""

    path: str
    """Relative to the root, with forward slashes."""
    folder: str
    """The published split that it is in: "train", "valid", "test", or "" if there are no split folders."""
    class_name: str


@dataclass(frozen=True)
class LeftAside:
    """Files that are not used, without being a fault."""

    reason: str
    files: int
    example: str
    """The path of one of them."""

    def __str__(self) -> str:
        return f"not used, {self.reason}: {self.files}, such as {self.example}"


class ListedGroup(NamedTuple):
    """The group of an image, for example its patient, in a groups.csv."""

    name: str
    file: str
    """The path of this groups.csv in the data folder."""


class Found(NamedTuple):
    """All that lies in a data folder."""

    files: list[ImageFile]
    """Sorted by path."""
    groups: dict[str, str]
    """The groups that the user lists, by path."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of folders that cannot be opened, and of names that cannot be used."""
    left_aside: list[LeftAside]
    unmatched: str = ""
    """What is wrong with the class map, if some of its keys match nothing."""


def scan_folder(root: Path) -> Scan:
    """Walks the data folder, see `scan`.

    Raises:
        DataError: it is not a folder, or cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds train/, valid/, test/ (--data)")
    try:
        return scan(root)
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}") from error


def find_images(root: Path, class_map: Mapping[str, str] | None = None, fewest_classes: int = 2) -> Found:
    """Finds the images below `root`, with the classes of their folders.

    The class folders are inside train, valid and test (or their usual synonyms), or side by side in one folder, which
    is `root` or a folder inside it. A class folder may contain folders. Its name is one of the four classes, alone or
    followed by `_` and a stage ("adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib"), or a key of `class_map`. Case and
    separators do not matter.

    Raises:
        DataError: no images, images outside a class folder, an empty class folder, a folder whose class is
            unknown, class folders in several places, fewer than `fewest_classes`, or a malformed groups.csv.
    """
    found = scan_folder(root)
    spellings = spellings_of(class_map)
    base = _base(root, found, spellings)
    splits = [
        folder
        for folder in _children(found, base)
        if _split_of(folder) and any(_is_below(path, folder) for path in found.files)
    ]
    class_of = {
        folder: class_name
        for above in splits or [base]
        for folder in _children(found, above)
        if (class_name := class_of_folder(posixpath.basename(folder), spellings)) is not None
    }
    images: dict[str, list[str]] = {folder: [] for folder in class_of}
    others: list[str] = []  # in no class folder
    depth = (base.count("/") + 1 if base else 0) + (2 if splits else 1)  # of the class folders
    for path in found.files:
        images.get("/".join(path.split("/")[:depth]), others).append(path)
    _take_others(root, base, splits, others, found)
    for folder, paths in images.items():
        if not paths and not any(_is_below(path, folder) for path, _ in found.unreadable):
            raise DataError(f"the class folder {folder}/ in {root} holds no images; fill or remove it")
        if other := class_inside(class_of[folder], [path.removeprefix(folder) for path in paths]):
            raise DataError(f"{folder}/ in {root} has a folder of another class, {other}/; move it out")
    files = [
        ImageFile(path, _split_of(posixpath.dirname(folder)) if splits else "", class_of[folder])
        for folder, paths in images.items()
        for path in paths
    ]
    classes = {file.class_name for file in files}
    if len(classes) < fewest_classes and not found.unreadable:
        only = f"only the class {classes.pop()!r}" if classes else "no images"
        raise DataError(
            f"found {only} in {root}; expected at least {number_of(fewest_classes, 'folder')} named after their "
            f"classes, in train/, valid/, test/ or directly in the data folder{_aside_in_words(found)}"
        )
    holding = {
        folder for file in {PurePosixPath(file.path).parent for file in files} for folder in (file, *file.parents)
    }
    groups = [path for path in found.groups if PurePosixPath(path).parent in holding]
    for path in set(found.groups) - set(groups):
        found.put_aside(DOCUMENTS, path)
    names = {posixpath.basename(folder) for folder in class_of}
    wrong = unmatched_keys(class_map, {letters for name in names for letters in beginnings(name)}, names)
    unmatched = wrong and f"no class folder in {root} is called {wrong}; there are {', '.join(sorted(names))}"
    listed = listed_groups(root, sorted(groups), [file.path for file in files])
    known = {path: group.name for path, group in listed.items()}
    return Found(sorted(files), known, sorted(found.unreadable), count_aside(found.aside), unmatched)


def count_aside(aside: Mapping[str, Sequence[str]]) -> list[LeftAside]:
    """The files that are left aside, by reason, as counts with an example."""
    return [LeftAside(reason, len(paths), min(paths)) for reason, paths in sorted(aside.items())]


def listed_groups(root: Path, files: list[str], paths: list[str]) -> dict[str, ListedGroup]:
    """The groups that files groups.csv give to images, by path.

    groups.csv has the columns path and group. Its paths are relative to its own folder, see `read_listing`.

    Args:
        root: the data folder.
        files: the paths of the files groups.csv in it.
        paths: of the images.

    Raises:
        DataError: a file is malformed, has one path twice, or names a path that is not among `paths`; or two files
            give an image different groups.
    """
    group_of: dict[str, ListedGroup] = {}
    for file in files:
        rows = read_listing(root / file, ["path", "group"], paths, root / posixpath.dirname(file), root)
        for path, name in rows["group"].items():
            first = group_of.setdefault(str(path), ListedGroup(name, file))
            if first.name != name:
                raise DataError(
                    f"{root / first.file} and {root / file} give {path!r} different groups; remove one of the lines"
                )
    return group_of


def read_rows(file: Path) -> pd.DataFrame:
    """Reads a CSV that a user has written, all of it as text, without spaces around the values. Paths keep theirs.

    Known columns are found in any case: a column of groups that is called "Group" must not be missed.

    Raises:
        DataError: it cannot be read, is no CSV, names a column twice, or a line has more or fewer values than there are
            columns.
    """
    try:
        reader = csv.reader(StringIO(read_text(file), newline=None), strict=True)
        lines = (values for values in reader if len(values) > 1 or "".join(values).strip())
        names = [_COLUMNS.get(name.strip().lower(), name.strip()) for name in next(lines, [])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{file} has several columns {twice[0]!r}; remove or rename one")
        rows = []
        for values in lines:
            if len(values) != len(names):
                raise DataError(
                    f"{file}, line {reader.line_num} has {number_of(len(values), 'value')}, and the first line names "
                    f"{number_of(len(names), 'column')}; remove or add a comma, or put a value that has commas into "
                    "quotes"
                )
            rows.append([text if name == "path" else text.strip() for name, text in zip(names, values, strict=True)])
        return pd.DataFrame(rows, columns=names, dtype=str)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); save it again as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{file} is not a CSV file: {error}") from error


def read_listing(
    file: Path, columns: list[str], paths: Collection[str], folder: Path, root: Path, also: Iterable[str] = ()
) -> pd.DataFrame:
    """Reads a CSV in which a user says something about images, a line for each.

    Args:
        columns: those that it must have, "path" and others. None of their values may be empty.
        paths: of the images, relative to `root`.
        folder: what the paths in the file are relative to, in any spelling of the same path (`./a.png`, `b/../a.png`),
            with letters composed or decomposed as Unicode allows.
        also: other columns that it may have.

    Returns:
        The columns but "path", as text. The index is the images' paths as in `paths`.

    Raises:
        DataError: it is malformed, has one path twice, or names a path that is not among `paths`.
    """
    rows = read_rows(file)
    if missing := [name for name in columns if name not in rows]:
        raise DataError(
            f"{file} is not a CSV file with the columns {','.join(columns)}: it has no {missing[0]}; name the columns "
            "in the first line, with commas between them"
        )
    rows = rows[[*columns, *rows.columns.intersection(list(also))]]
    inside = folder.relative_to(root).as_posix()
    path_of = {composed(path): path for path in paths} | {path: path for path in paths}
    found, line_of = [], dict[str, int]()
    for line, row in enumerate(rows.to_dict("records"), start=2):
        where = f"{file}, line {line}: the path {row['path']!r}"
        spelled = posixpath.normpath(posixpath.join(inside, row["path"]))
        path = path_of.get(spelled) or path_of.get(composed(spelled))
        if path is None:
            raise DataError(f"{where} is no image's; each line must name one image, relative to {folder}")
        if empty := [name for name, value in row.items() if not value]:
            raise DataError(f"{where} has an empty {empty[0]}; give the image's {empty[0]}, or remove the line")
        if (first := line_of.setdefault(path, line)) != line:
            raise DataError(
                f"{where} is named twice, first as {rows['path'].iloc[first - 2]!r}; remove one of the lines"
            )
        found.append(path)
    return rows.drop(columns="path").set_axis(found)


def _base(root: Path, found: Scan, spellings: Mapping[str, str]) -> str:
    """The folder that has the class folders or the split folders: the root, or one inside it.

    Archives unpack to one or more folders, such as `Data`, around it.
    """
    with_files: set[str] = set()
    for path in (*found.files, *(path for path, _ in found.unreadable)):
        with_files.update(map(str, PurePosixPath(path).parents))
    above = {  # folders that have a class folder or a split folder
        posixpath.dirname(folder)
        for folder in found.folders
        if folder in with_files
        and (_split_of(folder) or class_of_folder(posixpath.basename(folder), spellings) is not None)
    }
    bases: list[str] = []
    for folder in sorted(above, key=lambda folder: folder.split("/")):  # a folder before those inside it
        if not any(_is_below(folder, base) for base in bases):
            bases.append(folder)
    if len(bases) > 1:
        listing = ", ".join(f"{folder}/" for folder in bases[:_LISTED])
        raise DataError(
            f"{root} has class folders in several places: {listing}; give one of them as --data, or keep only one"
        )
    return bases[0] if bases else ""


def _take_others(root: Path, base: str, splits: list[str], others: list[str], found: Scan) -> None:
    """Puts aside the files in no class folder that are of other formats, or not in the folder of the class folders.

    Raises:
        DataError: there are others, which may be images.
    """
    beside: set[str] = set()  # folders
    loose: dict[str, list[str]] = {}
    unknown: Counter[str] = Counter()
    for path in others:
        folder, name = posixpath.split(path)
        if _suffix(path) in _NO_PICTURES:
            found.put_aside(OTHER_FORMATS, path)
        elif not _is_below(path, base):
            found.put_aside(OUTSIDE, path)
        elif folder in (base, *splits):
            loose.setdefault(folder, []).append(name)
        elif splits and not any(_is_below(path, split) for split in splits):
            beside.add(path.removeprefix(f"{base}/").split("/")[0])
        else:
            unknown[folder] += 1
    if beside:
        raise DataError(
            f"{root / base} has images in {', '.join(sorted(beside))} beside the folders "
            f"{', '.join(map(posixpath.basename, splits))}; keep either split folders or class folders"
        )
    for folder, names in loose.items():
        raise DataError(
            f"{root / folder} has {number_of(len(names), 'file')} in no class folder, such as {min(names)!r}; "
            "move each file into the folder of its class, or out of the data folder"
        )
    if unknown:
        raise DataError(_unknown_classes(root, unknown))


def _children(found: Scan, folder: str) -> list[str]:
    return sorted(path for path in found.folders if path and posixpath.dirname(path) == folder)


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _split_of(folder: str) -> str:
    return _SPLIT_FOLDERS.get(posixpath.basename(folder).lower(), "")


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _unknown_classes(root: Path, unknown: Mapping[str, int]) -> str:
    listing = first_lines([f"{folder}/ ({number_of(count, 'image')})" for folder, count in unknown.items()])
    example = posixpath.basename(next(iter(unknown)))
    return (
        f"the classes of these folders in {root} are not known:\n{listing}\n"
        f"The known classes are {', '.join(CANONICAL_CLASSES)}. To use other folders, give the class of each: "
        f'--class-map "{example}=CLASS,…" or class_map: {{{example}: CLASS, …}} in the settings file '
        "(for evaluate: --map)"
    )


def first_lines(lines: Sequence[str]) -> str:
    """The first lines of a list for an error message, and how many there are more."""
    more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:_LISTED], *more])


def _aside_in_words(found: Scan) -> str:
    words = [f"{len(paths)} {reason}" for reason, paths in sorted(found.aside.items())]
    return f". Left aside: {'; '.join(words)}" if words else ""
