"""A SQLite study lies on the disk of the machine that runs the search; a copy on the storage outlives that machine."""

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
"""How often the study is looked at: a copy lags behind it by this and by the time that the storage takes."""


class StudyMirror:
    """While it is entered, a thread keeps the copy up to date; the search never waits for it but at the end.

    Entering puts the copy in the study's place, where there is none or an older one (the search went on elsewhere).

    Raises:
        StorageError: from entering, where the storage cannot be read.
    """

    def __init__(self, experiment: Experiment, database: Path) -> None:
        self._experiment, self._database = experiment, database
        self._ended = Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> StudyMirror:
        copy = read_mirror(self._experiment)
        # nobody here has it open yet: a file's second closing would take the locks of SQLite's own
        here = self._database.read_bytes() if self._database.exists() else b""
        if copy is not None and _changes(copy) > _changes(here):
            self._database.with_name(f"{self._database.name}-journal").unlink(missing_ok=True)  # of the older one
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
                except (sqlite3.Error, StorageError) as error:  # the next one may succeed
                    self._failure = error
            if last:
                return


def read_mirror(experiment: Experiment) -> bytes | None:
    """The study as one upload left it; None where no copy is.

    Whoever reads an object learns its size first: where a longer copy has come by then, only its beginning is read.

    Raises:
        StorageError: the storage cannot be read.
    """
    copy = experiment.read(COPY)
    while copy is not None and len(copy) < _size(copy) and (again := experiment.read(COPY)) != copy:
        copy = again
    return copy


def _size(database: bytes) -> int:
    """In bytes, as the database's header has it: https://sqlite.org/fileformat.html#the_database_header."""
    return int.from_bytes(database[16:18], "big") * int.from_bytes(database[28:32], "big")


def _changes(database: bytes) -> int:
    """How many transactions made it what it is: https://sqlite.org/fileformat.html#file_change_counter."""
    return int.from_bytes(database[24:28], "big")
