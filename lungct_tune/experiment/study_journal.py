"""Optuna's journal of a study, written by one process that does not wait for the disk.

The file has a line of JSON for each change of the study. Optuna's `JournalFileBackend` and optuna-dashboard read it,
also while a search writes. It needs no locks of the file system, so it may be in a folder that hosts share.
"""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from lungct_tune.errors import SearchStopped, first_line

_log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.2
"""How long a change may wait for the disk. A process that is killed loses the changes of this time."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that is full, or of a user who may not write more to it."""

FULL_S = 300.0
"""How long changes wait for a full disk to have space again. The search goes on meanwhile."""

FULL_AT_END_S = 10.0
"""How long they wait when the search has ended or has been stopped."""

RETRY_S = 1.0


class JournalError(SearchStopped):
    """The study's journal cannot be written. The message names the file and says what to do."""


class StudyJournal(BaseJournalBackend):
    """A journal in a file. A thread writes the changes of the last 0.2 s together.

    Optuna's own backend locks the file, writes to it and waits for the disk at every change, and reads it again after
    that. Here the only reader is the `JournalStorage` of the same process, which gets its changes from memory. So only
    one process may write the file.

    Args:
        file: created if it does not exist. An incomplete last line, left by a process that was killed, is cut off.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file = file.open("ab", buffering=0)  # appends, also after lines that another program has added
        self._count = _cut_incomplete_line(file)
        self._recent: list[dict[str, Any]] = []
        """The last changes; those that the storage has read already are dropped."""
        self._waiting: list[bytes] = []
        self._appended = self._written = 0
        self._urgent = self._closed = False
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """The changes from this number on; see Optuna's `BaseJournalBackend`."""
        begin = self._count - len(self._recent)
        if log_number_from < begin:
            return self._read_file(log_number_from)
        self._recent = self._recent[log_number_from - begin :]
        return self._recent

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds changes; see Optuna's `BaseJournalBackend`.

        Raises:
            JournalError: an earlier change could not be written.
        """
        lines = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        with self._changed:
            self._check()
            self._waiting.append(lines)
            self._appended += 1
            self._recent = [*self._recent, *logs]
            self._count += len(logs)
            self._changed.notify_all()

    def sync(self) -> None:
        """Waits until all changes so far are on the disk.

        Raises:
            JournalError: they could not be written.
        """
        with self._changed:
            target, self._urgent = self._appended, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._written >= target or self._error)
            self._check()

    def close(self) -> None:
        """Writes the last changes and ends the thread.

        Raises:
            JournalError: they could not be written.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._file.close()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise JournalError(
                f"the study {self._path} cannot be written: {_reason(self._error)}. The search stops, so that no more "
                "results are lost. Correct that, then continue it"
            ) from self._error

    def _read_file(self, start: int) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            for line in islice(file, start, self._count):
                yield json.loads(line)

    def _append(self, lines: bytes) -> None:
        """Appends to the file. It waits while the disk is full, and then continues where it had to end.

        Raises:
            OSError: the file cannot be written, or the disk has been full for too long.
        """
        rest, since = memoryview(lines), None  # since when it has been full
        while rest:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                patience_s = FULL_AT_END_S if self._closed else FULL_S
                if error.errno not in FULL or (since is not None and time.monotonic() - since > patience_s):
                    raise
                if since is None:
                    since = time.monotonic()
                    _log.warning(
                        "the study %s cannot be written: the disk is full. The search goes on and tries again for "
                        "%.0f min; free some space",
                        *(self._path, FULL_S / 60),
                    )
                time.sleep(RETRY_S)
        if since is not None:
            _log.warning("the study %s is written again", self._path)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(lambda: self._urgent or self._closed, timeout=WRITE_EVERY_S)
                lines, self._waiting, target = self._waiting, [], self._appended
                self._urgent, last = False, self._closed
            try:
                self._append(b"".join(lines))
                os.fsync(self._file.fileno())
                if not self._path.exists():  # what is written to a deleted file is lost without an error
                    raise FileNotFoundError("it has been deleted or moved")
            except OSError as error:
                self._error = error
            with self._changed:
                self._written = target
                self._changed.notify_all()
            if last or self._error:
                return


class StudyStorage(JournalStorage):
    """Optuna's journal storage on a `StudyJournal`."""

    def __init__(self, file: Path) -> None:
        self._journal = StudyJournal(file)
        self._open: list[int] = []
        """Those of the first `_known` trials that may not have ended. A journal's trials have the ids 0, 1, 2 …"""
        self._known = 0
        super().__init__(self._journal)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials in the order of their numbers; see Optuna's `BaseStorage`.

        Optuna looks for waiting trials each time that it is asked for one, and TPE for running ones. So those that have
        not ended are found without a look at the others.
        """
        if states is None or any(state.is_finished() and state in states for state in TrialState):
            return super().get_all_trials(study_id, deepcopy, states)
        with suppress(KeyError):  # there is no such trial yet
            while self.get_trial(self._known):
                self._open.append(self._known)
                self._known += 1
        trials = {trial_id: self.get_trial(trial_id) for trial_id in self._open}
        self._open = [trial_id for trial_id, trial in trials.items() if not trial.state.is_finished()]
        chosen = [trial for trial in trials.values() if trial.state in states]
        return copy.deepcopy(chosen) if deepcopy else chosen

    def sync(self) -> None:
        """Waits until all changes so far are on the disk, see `StudyJournal.sync`."""
        self._journal.sync()

    def close(self) -> None:
        """Writes the last changes, see `StudyJournal.close`."""
        self._journal.close()


@contextmanager
def opened_journal(file: Path) -> Iterator[StudyStorage]:
    """Opens a journal for writing; at the end the last changes are written.

    Raises:
        JournalError: it cannot be opened, is damaged, or at the end cannot be written.
    """
    try:
        storage = StudyStorage(file)
    except OSError as error:
        raise JournalError(f"the study {file} cannot be opened: {_reason(error)}") from error
    except Exception as error:  # Optuna raises any kind about lines that it has not written
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise JournalError(f"the study {file} is damaged ({reason}); restore it") from error
    try:
        yield storage
    finally:
        storage.close()


def _reason(error: OSError) -> str:
    return "the disk is full" if error.errno in FULL else str(error)


def _cut_incomplete_line(file: Path) -> int:
    """Cuts off what follows the last line end; returns the number of lines."""
    lines = complete = 0
    with file.open("rb+") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                lines, complete = lines + 1, complete + len(line)
        stream.truncate(complete)
    return lines
