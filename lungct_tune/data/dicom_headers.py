"""Whose image a DICOM file is, and of which series, without a name: hashes with a key that only this user has.

Two files of one patient have the same hash, in this run and the next. Without the key, nobody can compute it from a
PatientID. The key is in the user's cache, and never in what a search writes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lungct_tune.data import dicom
from lungct_tune.data.cache import is_passing, require_space
from lungct_tune.display import tracked
from lungct_tune.files import replace_file

Pseudonym = Callable[[str, str], str]
"""Hashes an identifier, given its kind ("patient" or "series") and its value."""

_KEY, _KEY_BYTES = "pseudonyms.key", 32
_LETTERS = 16  # hexadecimal: 64 bits


class Header(NamedTuple):
    """What is used of a DICOM file's header."""

    aside: str
    """Why it is no slice to learn from, see `dicom.why_aside`; "" if it may be one."""
    patient: str
    """The hash of its PatientID, or "" if that is missing or empty."""
    series: str
    """The hash of its SeriesInstanceUID, or "" if that is missing."""


def pseudonyms(cache: Path) -> Pseudonym:
    """The user's keyed hash (HMAC with SHA-256). Makes the key in the cache folder if there is none.

    Raises:
        DataError: the cache folder cannot be written.
    """
    require_space(cache, _KEY_BYTES)
    file = cache / _KEY
    if not file.exists() or file.stat().st_size != _KEY_BYTES:
        replace_file(file, secrets.token_bytes(_KEY_BYTES))
    key = file.read_bytes()

    def pseudonym(kind: str, value: str) -> str:
        return hmac.new(key, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:_LETTERS]

    return pseudonym


def read_header(path: Path, pseudonym: Pseudonym) -> Header:
    """Reads a file's header. It is empty if the file is no DICOM, or damaged; `decode` then says what is wrong with it.

    Raises:
        OSError, MemoryError: it may be readable another time, see `is_passing`.
        DataError: pydicom is not installed.
    """
    try:
        if not dicom.is_dicom(path):
            return Header("", "", "")
        header, has_pixels = dicom.read_header(path)
        with dicom.nameless("its DICOM header cannot be read"):
            patient, series = (str(header.get(name) or "").strip() for name in ("PatientID", "SeriesInstanceUID"))
            aside = dicom.why_aside(header, has_pixels)
    except (OSError, ValueError, MemoryError) as error:
        if is_passing(error):
            raise
        return Header("", "", "")
    return Header(aside, patient and f"patient-{pseudonym('patient', patient)}", series and pseudonym("series", series))


def _read_or_none(path: Path, pseudonym: Pseudonym) -> Header | None:
    try:
        return read_header(path, pseudonym)
    except (OSError, MemoryError):
        return None


def read_headers(
    root: Path, digests: Mapping[str, str], cache: Path, progress: bool = False
) -> dict[str, Header | None]:
    """The headers of those files that are DICOM, by path. Those that were read before come from the cache.

    None stands for the header of a file that may be DICOM and may be readable another time, see `is_passing`.

    Args:
        root: the folder of the files.
        digests: the sha256 of each file, by its path in that folder.
        cache: the user's cache folder.
        progress: show a bar, if stderr is a terminal.

    Raises:
        DataError: there are DICOM files and pydicom is not installed, or the cache folder cannot be written.
    """

    def is_dicom(path: str) -> bool | None:
        try:
            return dicom.is_dicom(root / path)
        except OSError as error:
            return None if is_passing(error) else False

    with ThreadPoolExecutor() as pool:
        are_dicom = dict(zip(digests, pool.map(is_dicom, digests), strict=True))
    paths = [path for path in digests if are_dicom[path]]
    unread: dict[str, Header | None] = dict.fromkeys(path for path in digests if are_dicom[path] is None)
    if not paths:
        return unread
    dicom.load_pydicom()
    pseudonym = pseudonyms(cache)
    content = [dicom.VERSION, pseudonym("key", ""), [digests[path] for path in paths]]
    entry = cache / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.headers.json"
    try:
        kept: list[Header | None] = [Header(*header) for header in json.loads(entry.read_text())]
    except (OSError, ValueError, TypeError):
        kept = []
    if len(kept) != len(paths):
        read = tracked(paths, "Reading DICOM headers", len(paths), shown=progress)
        kept = [_read_or_none(root / path, pseudonym) for path in read]
        if None not in kept:
            replace_file(entry, json.dumps(kept).encode())
    return unread | dict(zip(paths, kept, strict=True))
