"""The lock of a search: only one process runs it, on this machine or on any other."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread
from typing import IO, Any

from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import StorageError

LOCK = ".lock"
"""In the local folder: the file that is locked."""

RUNNING = "running.json"
"""On remote storage: which machine runs the search. That machine writes it again and again."""

PERIOD_S = 20.0
"""Seconds from one writing to the next."""

SETTLE_S = 1.0
"""Seconds after which a machine that begins reads what it has written. If two begin at once, one finds the other's."""

SILENT_S = 60.0
"""Of a machine that has written nothing for so long it is assumed that it does not run the search any more."""


@contextmanager
def exclusive_lock(experiment: Experiment, say: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Locks the experiment for this process.

    On this machine the system releases the lock when the process ends, also after a crash. After a crash on another
    machine, with remote storage, this waits for `SILENT_S`. On a file system without locks it does nothing.

    Args:
        say: is called with a sentence before it waits.

    Raises:
        StorageError: another process runs this search, or the storage cannot be used.
    """
    with _locked_on_this_machine(experiment):
        if experiment.is_local:
            yield
        else:
            _refuse_another_machine(experiment, say)
            with _telling_other_machines(experiment):
                yield


@contextmanager
def _locked_on_this_machine(experiment: Experiment) -> Iterator[None]:
    """Locks a file in the local folder. Of folders that this makes, those that are empty at the end are removed."""
    folder = experiment.local_folder
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise StorageError(f"the study's folder {folder} cannot be used: {error}") from error
    with lock:
        _lock(lock, fcntl.LOCK_EX, experiment)
        try:
            yield
        finally:
            with suppress(OSError):
                if made and os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    for path in made:
                        path.rmdir()


def refuse_running(experiment: Experiment) -> None:
    """Looks at the lock on this machine without taking it, so that a search that runs is refused before any work.

    Raises:
        StorageError: another process runs this search.
    """
    with suppress(OSError), (experiment.local_folder / LOCK).open() as lock:
        _lock(lock, fcntl.LOCK_SH, experiment)


def _lock(lock: IO[str], kind: int, experiment: Experiment) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if not os.fstat(lock.fileno()).st_nlink:  # the process that had it has just removed it
            raise BlockingIOError
    except BlockingIOError as error:
        raise StorageError(f"another process is running {experiment.name}; wait for it, or stop it first") from error
    except OSError:
        pass


def _refuse_another_machine(experiment: Experiment, say: Callable[[str], None]) -> None:
    found, here = _running(experiment), _place(experiment)
    if found is None or (found["host"] == here["host"] and found["folder"] in (None, here["folder"])):
        return  # a process that runs it from here would have the lock; earlier versions wrote no folder
    say(f"{found['host']} has not ended {experiment.name}: looking for {SILENT_S:.0f} s whether it still runs it")
    deadline = time.monotonic() + SILENT_S
    while (now := _running(experiment)) is not None and time.monotonic() < deadline:
        if now != found:
            raise _runs_there(experiment, now)
        time.sleep(1)


def _runs_there(experiment: Experiment, running: dict[str, Any]) -> StorageError:
    return StorageError(
        f"{running['host']} is running {experiment.name}, in process {running['process']}; wait for it, or stop it "
        "there first"
    )


def _running(experiment: Experiment) -> dict[str, Any] | None:
    """What the machine that runs the search has written last; None if none runs it."""
    with suppress(ValueError, KeyError, TypeError):  # another program has written the file
        found = json.loads(experiment.read(RUNNING) or b"{}")
        return {name: found[name] for name in ("host", "process", "times")} | {"folder": found.get("folder")}
    return None


def _place(experiment: Experiment) -> dict[str, Any]:
    """The host, and the folder of the lock, which depends on the working folder."""
    return {"host": socket.gethostname(), "folder": str(experiment.local_folder)}


@contextmanager
def _telling_other_machines(experiment: Experiment) -> Iterator[None]:
    ended, me = Event(), _place(experiment) | {"process": os.getpid()}

    def write(times: int) -> None:
        experiment.write(RUNNING, json.dumps(me | {"times": times}).encode())

    def tell() -> None:
        for times in count(1):
            if ended.wait(PERIOD_S):
                return
            with suppress(StorageError):  # the next time may succeed
                write(times)

    thread = Thread(target=tell, daemon=True)
    try:
        write(0)
        time.sleep(SETTLE_S)
        if (found := _running(experiment)) and not found.items() >= me.items():
            raise _runs_there(experiment, found)
        thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join(timeout=PERIOD_S)  # a storage that does not answer keeps nobody
        with suppress(StorageError):
            if (found := _running(experiment)) and found.items() >= me.items():
                experiment.delete(RUNNING)
