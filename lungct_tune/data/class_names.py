"""Which class the name of a folder means, or a name in a table: one of the four classes, or what a class map says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping

from lungct_tune.errors import UserError

MOST_CLASSES, LONGEST_NAME = 1000, 200
"""A bundle with more classes, or with longer names, is not read: others may have written it."""

CANONICAL_CLASSES = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")


def composed(name: str) -> str:
    """A name whose letters are composed as on Linux; macOS decomposes them."""
    return unicodedata.normalize("NFC", name)


_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def letters(name: str) -> str:
    """A name without separators and without case, for comparing. A number, such as -1 or 1.5, stays as it is."""
    name = composed(name).casefold().strip()
    return name if _NUMBER.fullmatch(name) else re.sub(r"[\W_]", "", name)


_CANONICAL = {letters(name): name for name in CANONICAL_CLASSES}


def spellings_of(class_map: Mapping[str, str] | None) -> dict[str, str]:
    """A class map whose keys are only letters.

    Raises:
        UserError: two keys have the same letters and other classes.
    """
    spellings: dict[str, str] = {}
    for name, mapped in (class_map or {}).items():
        first = spellings.setdefault(letters(name), _canonical(mapped))
        if first != _canonical(mapped):
            raise UserError(
                f"the class map has {name!r} as {mapped}, and as {first} a name that differs only in case, spaces or "
                "signs, which are not looked at; rename one of the two, in the map and where the images are"
            )
    return spellings


def class_in_table(name: str, spellings: Mapping[str, str]) -> str:
    """The class that a table names: by the class map, one of the four classes in any spelling, or another name."""
    return spellings.get(letters(name), _canonical(name))


def class_of_folder(name: str, spellings: Mapping[str, str]) -> str | None:
    """The class that a folder's name means, or None; `spellings` has priority over the four classes."""
    known = _CANONICAL | dict(spellings)
    return next((known[beginning] for beginning in beginnings(name) if beginning in known), None)


def class_inside(class_name: str, paths: Collection[str]) -> str:
    """A folder in these paths that is called one of the four classes, but not `class_name`; "" if there is none.

    Only if that is one of the four too: a class of a map may well have folders that are called like them.
    """
    if class_name not in CANONICAL_CLASSES:
        return ""
    folders = {folder for path in paths for folder in path.split("/")[:-1]}
    return min((folder for folder in folders if _CANONICAL.get(letters(folder), class_name) != class_name), default="")


def beginnings(folder_name: str) -> list[str]:
    """The letters of every beginning of a folder's name that may be a class, the longest first."""
    # A stage suffix begins at an underscore, but squamous_cell_carcinoma has underscores too. So every
    # beginning of the name that ends at an underscore is tried.
    parts = folder_name.split("_")
    return [letters("".join(parts[:n])) for n in range(len(parts), 0, -1)]


def unmatched_keys(class_map: Mapping[str, str] | None, used: Collection[str], there: Collection[str]) -> str:
    """The words for a message that name the keys of a class map that match nothing, with a suggestion for each.

    One of the four classes may be a key though it is not there: nothing that is there can be meant by it.

    Args:
        used: the letters that a key may have to match.
        there: the names that a key should match.

    Returns:
        Empty if all keys match.
    """
    from lungct_tune.cli import suggestion  # which workers do not need

    wrong = [key for key in class_map or {} if letters(key) not in used and letters(key) not in _CANONICAL]
    return ", ".join(f"{key!r}{suggestion(key, there)}" for key in wrong)


def _canonical(class_name: str) -> str:
    """The display name of one of the four classes, in any spelling; other names are only stripped."""
    return class_of_folder(class_name, {}) or composed(class_name.strip())
