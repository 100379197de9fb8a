"""Copies a SQLite study to the storage. The study itself is on the disk of the machine that runs the search."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import StorageError

COPY = "study.db"
"""The copy's path in the experiment."""

PERIOD_S = 1.0
"""Seconds between checks for a change. The copy is late by this and by the time of the upload."""


class StudyMirror:
    """A context manager in which a thread keeps the copy up to date. The search waits for the thread only at the end.

    On entering, a copy that is newer than the study replaces it. That happens when the search was continued on
    another machine.

    Raises:
        StorageError: on entering, the storage cannot be read.
    """

    def __init__(self, experiment: Experiment, database: Path) -> None:
        self._experiment, self._database = experiment, database
        self._ended = Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> StudyMirror:
        copy = read_mirror(self._experiment)
        # read before SQLite opens it here: closing the file a second time would drop SQLite's own locks
        here = self._database.read_bytes() if self._database.exists() else b""
        if copy is not None and _changes(copy) > _changes(here):
            self._database.with_name(f"{self._database.name}-journal").unlink(missing_ok=True)  # of the older study
            part = self._database.with_suffix(".part")
            part.write_bytes(copy)
            part.replace(self._database)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            logging.getLogger(__name__).warning("the copy of the study %s is old: %s", self._database, self._failure)

    def _follow(self) -> None:
        copied = None
        while True:
            last = self._ended.wait(PERIOD_S)
            written = self._database.stat().st_mtime_ns if self._database.exists() else None
            if written is not None and (last or written != copied):
                try:
                    with closing(sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True)) as study:
                        self._experiment.write(COPY, study.serialize())
                    copied, self._failure = written, None
                except (sqlite3.Error, StorageError) as error:  # the next copy may succeed
                    self._failure = error
            if last:
                return


def read_mirror(experiment: Experiment) -> bytes | None:
    """Reads the copy, as one upload left it; None if there is no copy.

    Reading asks for an object's size first. If a longer copy replaces the object after that, only the beginning of the
    longer copy is read. So a copy that is shorter than its header says is read again.

    Raises:
        StorageError: the storage cannot be read.
    """
    copy = experiment.read(COPY)
    while copy is not None and len(copy) < _size(copy) and (again := experiment.read(COPY)) != copy:
        copy = again
    return copy


def _size(database: bytes) -> int:
    """The size in bytes that the database's header gives: https://sqlite.org/fileformat.html#the_database_header."""
    return int.from_bytes(database[16:18], "big") * int.from_bytes(database[28:32], "big")


def _changes(database: bytes) -> int:
    """The database's count of transactions: https://sqlite.org/fileformat.html#file_change_counter."""
    return int.from_bytes(database[24:28], "big")
