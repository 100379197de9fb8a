"""Reads a table of the images and their classes, for a data folder without class folders."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path

import pandas as pd

from lungct_tune.data.cache import AT_FIRST
from lungct_tune.data.class_names import class_in_table, letters, spellings_of, unmatched_keys
from lungct_tune.data.dicom_headers import Header, Pseudonym
from lungct_tune.data.folders import (
    DataError,
    Found,
    ImageFile,
    count_aside,
    listed_groups,
    read_listing,
    read_rows,
)
from lungct_tune.data.scan import Scan

UNLISTED = "files that the table does not name"

SERIES, CLASS, GROUP = "SeriesInstanceUID", "class", "group"


def find_listed(
    root: Path,
    table: Path,
    found: Scan,
    headers: Mapping[str, Header | None],
    pseudonym: Pseudonym,
    class_map: Mapping[str, str] | None = None,
    fewest_classes: int = 2,
) -> Found:
    """Finds the images that a table names.

    The table is a CSV file. Each line has a path, relative to `root`, or the SeriesInstanceUID of a DICOM series; its
    class; and perhaps its group, for example the patient. Without groups, files groups.csv in the data folder may give
    them.

    Args:
        root: the data folder.
        table: the file.
        found: all that is in the data folder.
        headers: of the DICOM files in it, by path; None for one that could not be read.
        pseudonym: what hashed the series in `headers`.
        class_map: other names for classes of the table.
        fewest_classes: how many classes it must have.

    Raises:
        DataError: the table is malformed, names an image twice or one that is not there, or has too few classes.
    """
    unread: list[tuple[str, str]] = []
    rows = read_rows(table)
    if SERIES in rows:
        unread = [(path, AT_FIRST) for path, header in headers.items() if header is None]
        rows = _images_of_series(root, table, rows, headers, pseudonym)
    else:
        rows = read_listing(table, ["path", CLASS], found.files, root, root, also=[GROUP])
    spellings = spellings_of(class_map)
    classes = {name: class_in_table(name, spellings) for name in rows[CLASS].unique()}
    if len(set(classes.values())) < fewest_classes:
        few = "fewer than two classes; add lines for another class" if len(classes) else "no class; it has no lines"
        raise DataError(f"{table} has images of {few}")
    files = [ImageFile(str(path), "", classes[name]) for path, name in rows[CLASS].items()]
    known = {path: group.name for path, group in listed_groups(root, found.groups, found.files).items()}
    if GROUP in rows:
        known |= rows[GROUP]
    for path in sorted({*found.files} - {*rows.index} - dict(unread).keys()):
        found.put_aside(UNLISTED, path)
    wrong = unmatched_keys(class_map, set(map(letters, classes)), classes)
    unmatched = wrong and f"no class in {table} is called {wrong}; there are {', '.join(sorted(classes))}"
    unreadable = sorted(found.unreadable + unread)
    return Found(sorted(files), known, unreadable, count_aside(found.aside), unmatched)


def _images_of_series(
    root: Path, table: Path, rows: pd.DataFrame, headers: Mapping[str, Header | None], pseudonym: Pseudonym
) -> pd.DataFrame:
    """The class and perhaps the group of each image of the series in the table. The index is the images' paths."""
    if CLASS not in rows:
        raise DataError(f"{table} is not a CSV file with the columns {SERIES},{CLASS} and perhaps {GROUP}")
    rows = rows[[SERIES, CLASS, *rows.columns.intersection([GROUP])]]
    paths_of: dict[str, list[str]] = {}
    for path, header in headers.items():
        if header:
            paths_of.setdefault(header.series, []).append(path)
    unread = next((path for path, header in headers.items() if header is None), None)
    hint = f"run the command again, since {unread} could not be read, or " if unread else ""
    lines: dict[str, dict[Hashable, str]] = {}
    for number, row in enumerate(rows.to_dict("records"), start=2):
        where = f"{table}, line {number}"  # the series is not in a message, since it identifies a patient
        if empty := [name for name, value in row.items() if not value]:
            raise DataError(f"{where} has an empty {empty[0]}; fill it, or remove the line")
        paths = paths_of.get(pseudonym("series", row[SERIES]), [])
        if not paths:
            raise DataError(f"{where}: {root} has no file of this series; {hint}correct or remove the line")
        if paths[0] in lines:
            raise DataError(f"{where} names its series again; remove one of the lines")
        lines |= dict.fromkeys(paths, row)
    return pd.DataFrame(list(lines.values()), index=list(lines), columns=rows.columns)
