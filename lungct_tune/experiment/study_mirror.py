"""The study's copy on remote storage. The study itself is on the disk of the machine that runs the search.

A journal only grows, so its copy is in parts, `study/000000000000.journal` and so on, each named by the byte at which
it begins: a change uploads only the last part. Older searches have a SQLite database, whose copy is one file.
"""

from __future__ import annotations

import logging
import sqlite3
from abc import ABC, abstractmethod
from contextlib import closing, suppress
from pathlib import Path
from threading import Event, Thread

from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import StorageError

DATABASE = "study.db"
"""The SQLite study of an older search, or its copy: the path in the experiment."""

JOURNAL = "study.journal"
"""The study's journal: the path in the experiment's folder on a file system."""

PARTS = "study"
"""On remote storage: the folder with the parts of the journal's copy."""

PART_BYTES = 256 * 2**10
"""From this size on a part is complete, and the next one begins. Until then it is uploaded again at each change."""

PERIOD_S = 1.0
"""Seconds between checks for a change. The copy is late by this and by the time of the upload."""

BYTES_PER_S = 2**20
"""A SQLite study is uploaded whole, so larger ones less often: on average this many bytes per second."""


class StudyMirror(ABC):
    """A context manager in which a thread keeps the copy up to date. The search waits for the thread only at the end.

    On entering, a copy that is newer than the study replaces it. That happens when the search was continued on
    another machine.

    Raises:
        StorageError: on entering, the storage cannot be read.
    """

    def __init__(self, experiment: Experiment, study: Path) -> None:
        self._experiment, self._study = experiment, study
        self._period = PERIOD_S
        self._ended = Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> StudyMirror:
        # read before it is opened for writing here: closing a SQLite file a second time would drop SQLite's own locks
        here = self._study.read_bytes() if self._study.exists() else b""
        if (copy := self._newer(here)) is not None:
            self._study.with_name(f"{self._study.name}-journal").unlink(missing_ok=True)  # of an older SQLite study
            part = self._study.with_suffix(".part")
            part.write_bytes(copy)
            part.replace(self._study)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            logging.getLogger(__name__).warning("the copy of the study %s is old: %s", self._study, self._failure)

    @abstractmethod
    def _newer(self, here: bytes) -> bytes | None:
        """The copy, if it is newer than the study's content on this machine."""

    @abstractmethod
    def _copy(self) -> None:
        """Writes what has changed to the storage."""

    def _follow(self) -> None:
        copied = None
        while True:
            last = self._ended.wait(self._period)
            try:
                written = self._study.stat().st_mtime_ns if self._study.exists() else None
                if written is not None and (last or written != copied):
                    self._copy()
                    copied, self._failure = written, None
            except (sqlite3.Error, StorageError, OSError) as error:  # the next copy may succeed
                self._failure = error
            if last:
                return


class JournalMirror(StudyMirror):
    """The copy of a journal, in parts."""

    def _newer(self, here: bytes) -> bytes | None:
        parts = _parts(self._experiment)
        copy = _read_parts(self._experiment, parts)
        self._begin = parts[-1] if parts else 0
        self._sent = len(copy) - self._begin
        # a study that continues the copy is newer; any other is from before the search was continued elsewhere
        return None if here.startswith(copy) else copy

    def _copy(self) -> None:
        with self._study.open("rb") as file:
            file.seek(self._begin)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # an incomplete line may be cut off after a crash
        if len(content) > self._sent:
            self._experiment.write(_part(self._begin), content)
            self._sent = len(content)
        if self._sent >= PART_BYTES:
            self._begin, self._sent = self._begin + self._sent, 0


class DatabaseMirror(StudyMirror):
    """The copy of a SQLite study."""

    def _newer(self, here: bytes) -> bytes | None:
        copy = _read_database(self._experiment)
        return copy if copy is not None and _changes(copy) > _changes(here) else None

    def _copy(self) -> None:
        content = _serialize(self._study)
        self._experiment.write(DATABASE, content)
        self._period = max(PERIOD_S, len(content) / BYTES_PER_S)


def is_study(path: str) -> bool:
    """Whether a path in an experiment is of the study or of its copy."""
    return path in (DATABASE, JOURNAL) or path.startswith(f"{PARTS}/")


def remove_unbegun(experiment: Experiment, file: Path) -> list[str]:
    """Removes a journal and a copy in which no trial has begun: a search that was stopped at its start leaves them.

    Returns:
        Where trials have begun, so that nothing was removed.

    Raises:
        StorageError: the storage cannot be read.
    """
    left, begun = [], b'"datetime_start":"'
    with suppress(OSError):  # there is none, or it cannot be used, as whoever opens it will say
        if begun in file.read_bytes():
            left.append(str(file))
        else:
            file.unlink()
    if not experiment.is_local and (parts := _parts(experiment)):
        if begun in _read_parts(experiment, parts):
            left.append(f"{experiment.uri}/{PARTS}")
        else:
            experiment.delete_folder(PARTS)
    return left


def copy_study(experiment: Experiment, folder: Path) -> Path | None:
    """Copies the study to a folder, as it was at one moment, even while a search writes to it.

    Returns:
        The file, `study.journal` or `study.db`; None if the experiment's folder has no study.

    Raises:
        StorageError: the storage cannot be read.
    """
    if experiment.is_local:
        file, database = Path(experiment.uri, JOURNAL), Path(experiment.uri, DATABASE)
        journal = file.read_bytes() if file.is_file() else None
        old = _serialize(database) if database.is_file() else None
    else:
        parts = _parts(experiment)
        journal = _read_parts(experiment, parts) if parts else None
        old = None if parts else _read_database(experiment)
    if journal is not None:
        (folder / JOURNAL).write_bytes(journal[: journal.rfind(b"\n") + 1])
        return folder / JOURNAL
    if old is not None:
        (folder / DATABASE).write_bytes(old)
        return folder / DATABASE
    return None


def _part(begin: int) -> str:
    return f"{PARTS}/{begin:012d}.journal"


def _parts(experiment: Experiment) -> list[int]:
    """Where the parts of the journal's copy begin, in bytes."""
    names = (path.rpartition("/")[2].removesuffix(".journal") for path in experiment.files(PARTS))
    return sorted(int(name) for name in names if name.isdecimal())


def _read_parts(experiment: Experiment, parts: list[int]) -> bytes:
    """The journal, joined from its parts. The last one may be growing.

    Raises:
        StorageError: a part is missing, or has lost its end.
    """
    joined = bytearray()
    for begin in parts:
        if begin > len(joined):
            raise StorageError(
                f"{experiment.uri}/{PARTS} is not whole: what comes before {_part(begin).rpartition('/')[2]} has "
                f"{len(joined)} bytes instead of {begin}; restore the file before it"
            )
        joined[begin:] = experiment.read(_part(begin)) or b""
    return bytes(joined)


def _serialize(database: Path) -> bytes:
    """The content of a SQLite database, as it was at one moment."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as study:
        return study.serialize()


def _read_database(experiment: Experiment) -> bytes | None:
    """Reads the copy of a SQLite study, as one upload left it; None if there is no copy.

    Reading asks for an object's size first. If a longer copy replaces the object after that, only the beginning of the
    longer copy is read. So a copy that is shorter than its header says is read again.
    """
    copy = experiment.read(DATABASE)
    while copy is not None and len(copy) < _size(copy) and (again := experiment.read(DATABASE)) != copy:
        copy = again
    return copy


def _size(database: bytes) -> int:
    """The size in bytes that the database's header gives: https://sqlite.org/fileformat.html#the_database_header."""
    return int.from_bytes(database[16:18], "big") * int.from_bytes(database[28:32], "big")


def _changes(database: bytes) -> int:
    """The database's count of transactions: https://sqlite.org/fileformat.html#file_change_counter."""
    return int.from_bytes(database[24:28], "big")
