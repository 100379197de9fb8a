"""Reads a table of the images and their classes, for a data folder without class folders."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pandas as pd

from lungct_tune.data.dicom_headers import Header, Pseudonym
from lungct_tune.data.folders import DataError, Found, ImageFile, class_named, count_aside, known_groups, path_finder
from lungct_tune.data.scan import GROUPS, Scan
from lungct_tune.files import read_text

UNLISTED = "files that the table does not name"

PATH, SERIES, CLASS, GROUP = "path", "SeriesInstanceUID", "class", "group"


def find_listed(
    root: Path,
    table: Path,
    found: Scan,
    headers: Mapping[str, Header],
    pseudonym: Pseudonym,
    class_map: Mapping[str, str] | None = None,
) -> tuple[Found, dict[str, str | None]]:
    """Finds the images that a table names, and the group of each of their paths, None if it is not known.

    The table is a CSV file. Each line has a path, relative to `root`, or the SeriesInstanceUID of a DICOM series; its
    class; and perhaps its group, for example the patient. Without one, groups.csv in the data folder may give it.

    Args:
        root: the data folder.
        table: the file.
        found: all that is in the data folder.
        headers: of the DICOM files in it, by path.
        pseudonym: what hashed the series in `headers`.
        class_map: other names for classes of the table.

    Raises:
        DataError: the table is malformed, names an image twice or one that is not there, or has fewer than two classes.
    """
    rows = _read(table)
    paths_of: dict[str, list[str]] = {}
    for path, header in headers.items():
        paths_of.setdefault(header.series, []).append(path)
    find = path_finder(found.files)
    files: dict[str, ImageFile] = {}
    in_groups_csv = known_groups(root, [path for path in found.groups if path == GROUPS], found.files)
    known = dict(zip(found.files, in_groups_csv, strict=True))
    for line, row in enumerate(rows.to_dict("records"), start=2):
        where = f"{table}, line {line}"
        if PATH in row:
            paths = list(filter(None, [find(row[PATH])]))
        else:  # not in a message, since it identifies a patient
            paths = paths_of.get(pseudonym("series", row[SERIES].strip()), []) if row[SERIES].strip() else []
        if not paths:
            raise DataError(f"{where}: {root} has no such {'image' if PATH in row else 'series'}; correct the line")
        if not row[CLASS].strip():
            raise DataError(f"{where} has an empty class; give the image's class, or remove the line")
        if twice := next((path for path in paths if path in files), None):
            raise DataError(f"{where} names {twice} again; remove one of the lines")
        for path in paths:
            files[path] = ImageFile(path, "", class_named(row[CLASS], class_map))
            if group := row.get(GROUP, "").strip():
                known[path] = group
    if len(classes := {file.class_name for file in files.values()}) < 2:
        raise DataError(f"{table} has {len(classes)} classes; expected at least two")
    for path in found.files:
        if path not in files:
            found.put_aside(UNLISTED, path)
    return Found(sorted(files.values()), [], sorted(found.unreadable), count_aside(found.aside)), known


def _read(table: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(StringIO(read_text(table)), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the table {table} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    names = set(rows.columns)
    if len(names & {PATH, SERIES}) != 1 or CLASS not in names or len(names) != len(rows.columns):
        raise DataError(
            f"{table} is not a CSV file with the columns {PATH},{CLASS} or {SERIES},{CLASS}, and perhaps {GROUP}"
        )
    return rows[[name for name in (PATH, SERIES, CLASS, GROUP) if name in names]]
