"""Finds the image files, their classes and their known groups, without opening an image.

Copies of the Kaggle data set name and nest their folders differently. This module knows the variants. It refuses a
folder name that it does not know, since a guessed class would be a guessed diagnosis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import pandas as pd

from lungct_tune.errors import UserError

CANONICAL_CLASSES = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}

# Files that people and systems leave beside images. Any other file should be an image, and is reported if it is not.
_NOT_IMAGES = {
    *(".csv", ".tsv", ".txt", ".md", ".rst", ".pdf", ".htm", ".html", ".json", ".xml", ".yaml", ".yml"),
    *(".docx", ".xls", ".xlsx", ".py", ".ipynb", ".npy", ".npz", ".zip", ".log", ".db", ".ini", ".lnk"),
    *("readme", "license", "licence"),
}


class DataError(UserError):
    """The data cannot be used as they are; the message says which files, why, and what to do."""


class ImageFile(NamedTuple):
    """A file that should be an image, with the split and the class that its folders give."""

    path: str
    """Relative to the root, with forward slashes."""
    folder: str
    """The published split that it is in: "train", "valid", "test", or "" if there are no split folders."""
    class_name: str


def find_images(root: Path, class_map: Mapping[str, str] | None = None) -> list[ImageFile]:
    """All image files below `root` or `root/Data`, sorted by path, with the classes of their folders.

    The class folders are inside train, valid and test (or their usual synonyms), or directly in the data folder. A
    class folder may contain folders. Its name is one of the four classes, alone or followed by `_` and a stage
    ("adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib"), or a key of `class_map`. Case and separators do not matter.

    Raises:
        DataError: no images, images outside a class folder, an empty class folder, a folder whose class is
            unknown, or fewer than two classes.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds train/, valid/, test/ (--data)")
    spellings = {_letters(name): _canonical(mapped) for name, mapped in (class_map or {}).items()}
    files: list[ImageFile] = []
    unknown: dict[str, int] = {}
    for folder, class_folder in _class_folders(image_base(root)):
        images = [path.relative_to(root).as_posix() for path in images_below(class_folder)]
        class_name = _class_of(class_folder.name, spellings)
        where = class_folder.relative_to(root).as_posix()
        if class_name is not None and not images:
            raise DataError(f"the class folder {where}/ in {root} holds no images; fill or remove it")
        if class_name is not None:
            files += [ImageFile(path, folder, class_name) for path in images]
        elif images:
            unknown[where] = len(images)
    if unknown:
        raise DataError(_unknown_classes(root, unknown))
    classes = {file.class_name for file in files}
    if len(classes) < 2:
        found = f"only the class {classes.pop()!r}" if classes else "no images"
        raise DataError(
            f"found {found} in {root}; expected at least two folders named after their classes, "
            "in train/, valid/, test/ or directly in the data folder"
        )
    return sorted(files)


def image_base(root: Path) -> Path:
    """`root`, or the `Data` folder inside it that Kaggle's archive unpacks to."""
    nested = [path for path in _visible_folders(root) if path.name.lower() == "data"]
    return nested[0] if len(nested) == 1 else root


def known_groups(root: Path, paths: Iterable[str]) -> list[str | None]:
    """The group of each path (a patient, for example) from groups.csv, or None if the file has no line for it.

    groups.csv has the columns path and group. It is in `root`, in `root/Data`, or in both. Its paths are relative to
    its own folder.

    Raises:
        DataError: the file is malformed, has one path twice, or names a path that is not among `paths`.
    """
    paths = list(paths)
    group_of: dict[str, str] = {}
    for folder in dict.fromkeys((root, image_base(root))):
        file = folder / "groups.csv"
        if not file.exists():
            continue
        try:
            rows = pd.read_csv(file, dtype=str, keep_default_na=False)
            rows = rows[["path", "group"]]
        except (ValueError, KeyError) as error:
            raise DataError(f"{file} is not a CSV file with the columns path,group: {error}") from error
        prefix = folder.relative_to(root)
        listed = [(prefix / path).as_posix() for path in rows["path"]]
        wrong = sorted(set(listed) - set(paths)) or rows["path"][rows["path"].duplicated()].tolist()
        if wrong or (rows["group"] == "").any():
            reason = f"bad paths, such as {wrong[0]!r}" if wrong else "empty groups"
            raise DataError(f"{file} has {reason}; each line must name one image, relative to {folder}, and its group")
        group_of |= dict(zip(listed, rows["group"], strict=True))
    return [group_of.get(path) for path in paths]


def _class_folders(base: Path) -> list[tuple[str, Path]]:
    """(published split or "", class folder) for each class folder of `base`."""
    split_folders = [path for path in _visible_folders(base) if path.name.lower() in _SPLIT_FOLDERS]
    others = [path for path in _visible_folders(base) if path not in split_folders]
    if not split_folders:
        _refuse_loose_images(base)
        return [("", path) for path in others]
    if astray := [path.name for path in others if images_below(path)]:
        raise DataError(
            f"{base} has images in {', '.join(astray)} beside the folders "
            f"{', '.join(path.name for path in split_folders)}; keep either split folders or class folders"
        )
    for path in (base, *split_folders):
        _refuse_loose_images(path)
    return [
        (_SPLIT_FOLDERS[split_folder.name.lower()], path)
        for split_folder in split_folders
        for path in _visible_folders(split_folder)
    ]


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_clutter(path))


def images_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders that should be images; hidden files, tables and texts are not."""
    return [
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not any(map(is_clutter, (path, *path.relative_to(folder).parents)))
    ]


def is_clutter(path: PurePath) -> bool:
    """Whether a file or folder is one that people and systems leave beside images."""
    name = path.name.lower()
    return name.startswith(".") or name == "__macosx" or (path.suffix.lower() or name) in _NOT_IMAGES


def _refuse_loose_images(folder: Path) -> None:
    if loose := sorted(path.name for path in folder.iterdir() if not path.is_dir() and not is_clutter(path)):
        raise DataError(
            f"{len(loose)} files in {folder} are in no class folder, such as {loose[0]!r}; "
            "move each file into the folder of its class, or out of the data folder"
        )


def _letters(name: str) -> str:
    """A name without separators and without case, for comparing."""
    return re.sub(r"[\W_]", "", name.casefold())


def _canonical(class_name: str) -> str:
    """The display name of one of the four classes, in any spelling; other names are only stripped."""
    return _class_of(class_name, {}) or class_name.strip()


def _class_of(folder_name: str, spellings: Mapping[str, str]) -> str | None:
    """The class that a folder's name means, or None; `spellings` has priority over the four classes."""
    # A stage suffix begins at an underscore, but squamous_cell_carcinoma has underscores too. So every
    # beginning of the name that ends at an underscore is tried, the longest first.
    parts = folder_name.split("_")
    beginnings = [_letters("".join(parts[:n])) for n in range(len(parts), 0, -1)]
    known = {_letters(name): name for name in CANONICAL_CLASSES} | dict(spellings)
    return next((known[name] for name in beginnings if name in known), None)


def _unknown_classes(root: Path, unknown: Mapping[str, int]) -> str:
    listing = "\n".join(f"  {folder}/ ({count} images)" for folder, count in unknown.items())
    example = Path(next(iter(unknown))).name
    return (
        f"the classes of these folders in {root} are not known:\n{listing}\n"
        f"The known classes are {', '.join(CANONICAL_CLASSES)}. To use other folders, give the class of each: "
        f'--class-map "{example}=CLASS,…" or class_map: {{{example}: CLASS, …}} in the settings file '
        "(for evaluate: --map)"
    )
