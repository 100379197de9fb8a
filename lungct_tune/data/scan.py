"""Walks the data folder once. Every file in it is a possible image, or left aside with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lungct_tune.files import is_text

CLUTTER = "thumbnails and other files of file managers, network storage, archivers and version control"
DOCUMENTS = "text, tables, programs and other documents"
OTHER_FORMATS = "files of other formats outside the class folders"
OUTSIDE = "images outside the folder that has the class folders"
LOOPS = "links to a folder that they are in"

MOST_FILES = 1_000_000
"""In a data folder. A link may lead to the root of the file system."""

_CLUTTER_NAMES = {
    *("@eadir", "@recycle", "#recycle", "@recently-snapshot", "#snapshot", "~snapshot"),  # Synology, QNAP, NetApp
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("zbthumbnail.info", "picasa.ini", "lost+found", "cvs", "__pycache__", "paxheader", "paxheaders"),
}
_CLUTTER_ENDS = ("~", ".tmp", ".part", ".crdownload", ".bak", ".orig", ".swp")  # also of downloads and editors

_DOCUMENTS = {
    *(".csv", ".tsv", ".txt", ".md", ".rst", ".pdf", ".htm", ".html", ".json", ".xml", ".yaml", ".yml", ".rtf"),
    *(".doc", ".docx", ".odt", ".ppt", ".pptx", ".xls", ".xlsx", ".ods", ".py", ".ipynb", ".m", ".r", ".sh"),
    *(".log", ".db", ".sqlite", ".ini", ".cfg", ".lnk", ".url", ".bib", ".css", ".js"),
    *("readme", "license", "licence", "makefile", "dicomdir"),
}

GROUPS = "groups.csv"


@dataclass
class Scan:
    """What lies in a data folder. Paths are relative to it, with forward slashes; "" is the folder itself."""

    files: list[str] = field(default_factory=list)
    """What should be images."""
    folders: list[str] = field(default_factory=list)
    """All folders that are not clutter, a folder before its content."""
    groups: list[str] = field(default_factory=list)
    """The files groups.csv."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of folders that cannot be opened, and of names that are not UTF-8."""
    aside: dict[str, list[str]] = field(default_factory=dict)
    """The files that are left aside, by reason."""

    def put_aside(self, reason: str, path: str) -> None:
        self.aside.setdefault(reason, []).append(path)


def scan(root: Path) -> Scan:
    """Walks a folder. Linked folders are followed, except to a folder that the link is in.

    Raises:
        OSError: the folder itself cannot be opened, or there are more than `MOST_FILES` files.
    """
    found, seen = Scan(), 0
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(root / folder)
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if not folder:
                raise
            found.unreadable.append((f"{folder}/", f"the folder cannot be opened: {error.strerror}"))
            continue
        if (here := (status.st_dev, status.st_ino)) in above:
            found.put_aside(LOOPS, folder)
            continue
        found.folders.append(folder)
        if (seen := seen + len(entries)) > MOST_FILES:
            raise OSError(f"it has more than {MOST_FILES:,} files, in folders and linked folders")
        for entry in entries:
            path = f"{folder}/{entry.name}".removeprefix("/")
            if not is_text(path):
                printable = os.fsencode(path).decode(errors="backslashreplace")
                found.unreadable.append((printable, "the name is not UTF-8; rename it"))
            elif _is_clutter(entry.name):
                for inside in _files_below(entry):
                    found.put_aside(CLUTTER, inside.removeprefix(f"{root}/"))
            elif _is_folder(entry):
                waiting.append((path, above | {here}))
            elif entry.name == GROUPS:
                found.groups.append(path)
            elif _is_document(path):
                found.put_aside(DOCUMENTS, path)
            else:
                found.files.append(path)
    return found


def why_aside(path: str) -> str:
    """The reason for which a file would be left aside by its path alone, as in a listing of a storage; or ""."""
    if any(map(_is_clutter, path.split("/"))):
        return CLUTTER
    return DOCUMENTS if _is_document(path) else ""


def _is_clutter(name: str) -> bool:
    name = name.lower()
    return name in _CLUTTER_NAMES or name.startswith((".", "~$")) or name.endswith(_CLUTTER_ENDS)


def _is_document(path: str) -> bool:
    name = PurePosixPath(path.lower())
    return (name.suffix or name.name) in _DOCUMENTS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _files_below(entry: os.DirEntry[str]) -> Iterator[str]:
    """A file, or all files below a folder; links are not followed."""
    if not entry.is_dir(follow_symlinks=False):
        yield os.fsencode(entry.path).decode(errors="backslashreplace")
        return
    for folder, _, names in os.walk(entry.path):
        yield from (os.fsencode(f"{folder}/{name}").decode(errors="backslashreplace") for name in names)
