"""Fetches an experiment's files to a folder on this machine and verifies them.

Files arrive in `DEST.part`, which is renamed to `DEST` when everything is there. After an interruption the next attempt
continues in `DEST.part`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow.fs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import CHECKSUMS, BundleError, checksum_errors, find_bundle
from lungct_tune.experiment.folder import STATE, Experiment
from lungct_tune.experiment.study_mirror import copy_study, is_study
from lungct_tune.filesystem import StorageError

AT_ONCE = 8
"""Files that are fetched at the same time."""

LOCK, BEGUN = ".lungct_tune-pull.lock", ".lungct_tune-begun"
"""In `DEST.part`: the lock file of the running pull, and the folder of files that have arrived only in part."""

TRANSIENT = ("*.part", ".lock", LOCK, ".probe*", "study.db-*", "study.journal.lock*", "*-images.npy")
"""Names of temporary files and folders. A search does not need them to continue."""

STATES = f"*{STATE}"
"""States of running trials. They may be deleted, or in searches of version 0.1 replaced, faster than they are fetched.
A fetched file of version 0.1 may then mix two versions. `--resume` ignores such a file, because its sha256 is wrong."""

TAKEN = "{} already exists and was not changed. Give another DEST, or move it away first"
"""The message about a destination that exists."""


class FetchError(UserError):
    """Nothing was fetched. The message says why and what to do."""


def fetch(experiment: Experiment, dest: Path, console: Console, *, everything: bool) -> str | None:
    """Fetches an experiment's bundle, or everything, to a new folder. A folder that already is that bundle stays.

    Args:
        dest: the folder to create: a bundle, or an experiment's folder that `--resume` accepts.
        everything: whether to fetch the whole experiment.

    Returns:
        The bundle's folder in the experiment; None if no trial has completed yet, so that everything has no bundle.

    Raises:
        FetchError: there is nothing to fetch, or `dest` cannot be created.
        BundleError: the bundle is damaged on the storage.
        StorageError: the experiment cannot be read, or the connection broke.
    """
    part = dest.parent / f"{dest.name or '_'}.part"  # . and / have no name
    try:
        return _fetch_verified(experiment, dest, part, console, everything)
    except StorageError as error:
        kept = f"\nThe files so far are kept in {part}. Run the same command again to continue" if part.is_dir() else ""
        raise StorageError(f"{error}{kept}") from error
    except (OSError, sqlite3.Error) as error:  # errors of this machine: the storage's are StorageErrors
        raise FetchError(
            f"{part} cannot be written ({error}). Fix that, then run the same command again to continue"
        ) from error


def check_destination(dest: Path, everything: bool) -> None:
    """Checks a destination before anything is fetched.

    Raises:
        FetchError: it exists and cannot be this bundle.
    """
    if os.path.lexists(dest) and (everything or not (dest / CHECKSUMS).is_file()):
        raise FetchError(TAKEN.format(dest))


def is_transient(path: str) -> bool:
    """Whether a path in an experiment is temporary, so that it is not needed to read or resume the experiment."""
    return any(fnmatchcase(part, pattern) for part in path.split("/") for pattern in TRANSIENT)


def _fetch_verified(experiment: Experiment, dest: Path, part: Path, console: Console, everything: bool) -> str | None:
    refused = set()
    while True:
        found = find_bundle(experiment)
        if found is None and not (everything and experiment.exists("settings.yaml")):
            raise FetchError(_nothing(experiment))
        check_destination(dest, everything)
        if os.path.lexists(dest):
            if not _same(dest, experiment, f"{found}/{CHECKSUMS}"):
                raise FetchError(TAKEN.format(dest))
            return found
        with _alone(part):
            _drop_links(part)
            # first: what is listed after it has the files of every trial that has ended in it
            study = copy_study(experiment, part) if everything else None
            prefix = "" if everything else f"{found}/"
            listed = experiment.files(prefix).items()
            sizes = {path: size for path, size in listed if not (is_transient(path) or is_study(path))}
            targets = {path: _inside(part, path.removeprefix(prefix)) for path in sizes}
            _drop_others(part, {*targets.values(), part / LOCK, study, *(part / BEGUN).glob("*")})
            _fetch_all(experiment, targets, part / BEGUN, sum(sizes.values()), console)
            folder = part / found if everything and found else part
            wrong = list(checksum_errors(folder)) if found else []
            if not wrong:
                shutil.rmtree(part / BEGUN)
                part.rename(dest)
                Path(dest, LOCK).unlink(missing_ok=True)
                return found
            shutil.rmtree(folder, ignore_errors=True)
        # tries once more from the start: the bundle was replaced meanwhile, or an earlier attempt fetched another one
        if found in refused:
            name, fault = wrong[0]
            raise BundleError(
                f"{experiment.uri}/{found}/{name}: {fault}. The bundle is damaged there, and nothing was pulled. "
                f"Its owner can delete {found}/ there, and --resume writes it again"
            )
        refused.add(found)


def _nothing(experiment: Experiment) -> str:
    if experiment.exists("settings.yaml"):
        return f"{experiment.name} has no model to pull: no trial has completed yet, or `clean` has deleted it"
    names = experiment.siblings()
    there = f"there are: {', '.join(names)}" if names else "there are no experiments"
    return f"no experiment {experiment.name!r} in {experiment.uri.rpartition('/')[0]}; {there}"


def _same(folder: Path, experiment: Experiment, checksums: str) -> bool:
    own = folder / CHECKSUMS
    return own.is_file() and own.read_bytes() == experiment.read(checksums) and not any(checksum_errors(folder))


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Creates the folder, or takes over that of an earlier pull, and locks it for this process.

    Raises:
        FetchError: another pull is using it, or no pull has made it.
    """
    mark = part / LOCK
    if os.path.lexists(part) and (part.is_symlink() or not mark.is_file()):
        raise FetchError(f"{part} exists, and no pull has made it. Move it away, or give another DEST")
    part.mkdir(parents=True, exist_ok=True)
    with locked(mark, f"another pull is writing {part}. Wait for it, or give another DEST"):
        yield


@contextmanager
def locked(file: Path, taken: str) -> Iterator[None]:
    """Makes a file and locks it for this process.

    Raises:
        FetchError: another process has locked it, with the message `taken`.
    """
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(taken) from error
        yield


def _inside(part: Path, path: str) -> Path:
    """The local path of a file.

    Raises:
        FetchError: it would be outside the folder.
    """
    if path.startswith("/") or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise FetchError(f"{path!r} points outside the experiment's folder, so nothing was pulled")
    return part / path


def _drop_links(part: Path) -> None:
    """Deletes links before anything is written, because they could point anywhere."""
    for path in sorted(part.rglob("*")):
        if path.is_symlink():
            path.unlink()


def _drop_others(part: Path, wanted: set[Path | None]) -> None:
    """Deletes files of earlier attempts that are not wanted now."""
    for path in sorted(part.rglob("*"), reverse=True):  # a folder comes after its content
        if path.is_file() and path not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _fetch_all(experiment: Experiment, targets: Mapping[str, Path], begun: Path, size: int, console: Console) -> None:
    """Fetches files in parallel, under a progress bar."""
    stopped = threading.Event()
    with transfer_bar(console) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        task = bar.add_task(experiment.name, total=size)

        def arrived(size: int) -> None:
            if stopped.is_set():
                raise CancelledError
            bar.advance(task, size)

        begun.mkdir(exist_ok=True)
        fetches = []
        for path, target in sorted(targets.items(), key=lambda item: not _is_state(item[1])):  # states do not wait
            target.parent.mkdir(parents=True, exist_ok=True)
            fetches.append(pool.submit(_fetch_file, experiment, path, target, begun, arrived))
        try:
            for fetched in as_completed(fetches):
                fetched.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_file(experiment: Experiment, path: str, target: Path, begun: Path, arrived: Callable[[int], None]) -> None:
    """Copies a file until the copy has its size and time. A file that is gone by then is deleted here too."""
    arrived(target.stat().st_size if target.exists() else 0)
    while (info := experiment.info(path)).is_file:
        written = info.mtime_ns or 0
        have = target.stat() if target.exists() else None
        if have and (have.st_size, have.st_mtime_ns) == (info.size, written):
            return
        part = beginning(begun, info)
        with part.open("ab") as file:
            arrived(file.tell())
            try:
                for chunk in experiment.chunks(path, start=file.tell()):
                    file.write(chunk)
                    arrived(len(chunk))
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                continue
            os.fsync(file.fileno())
        os.utime(part, ns=(written, written))
        part.replace(target)
        if _is_state(target):
            return
    target.unlink(missing_ok=True)


def _is_state(file: Path) -> bool:
    return fnmatchcase(file.name, STATES)


def beginning(begun: Path, info: pyarrow.fs.FileInfo) -> Path:
    """The path of this version of a file until it has arrived completely."""
    return begun / hashlib.sha256(f"{info.path} {info.size} {info.mtime_ns}".encode()).hexdigest()


def transfer_bar(console: Console) -> Progress:
    """A progress bar for bytes, shown while its context is open. It is not shown without a terminal."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
