"""Brings an experiment's files to a folder on this machine: verified, whole or not at all.

What arrives lies in `DEST.part`, where an attempt that follows a broken one goes on, and gets its name at the end.
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
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow.fs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import CHECKSUMS, BundleError, checksum_errors, find_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study_mirror import COPY, read_mirror
from lungct_tune.filesystem import StorageError

AT_ONCE = 8
"""Files that are fetched at the same time."""

LOCK, BEGUN = ".lock", ".begun"
"""In `DEST.part`: the mark of the pull that is at it, and a folder for the files that have not come whole."""

TRANSIENT = ("*.part", ".lock", ".probe*", "study.db-*", "*-images.npy")
"""Names of files and folders that a search keeps for the moment and does not need to go on."""

STATES = "last*.pt"
"""Files that a running trial may replace faster than they come. What has come of two of them is as none to `--resume`,
which sees by their own sha256 that it is no state."""

TAKEN = "{} already exists and was not changed. Give another DEST, or move it away first"
"""What is said of a destination, with its name."""


class FetchError(UserError):
    """Nothing was fetched: the message says why and what to do."""


def fetch(experiment: Experiment, dest: Path, console: Console, *, everything: bool) -> str | None:
    """Fetches an experiment's bundle, or everything, to a new folder; one that is that bundle already is left so.

    Args:
        dest: the folder to make: the bundle, or an experiment's folder that `--resume` can go on from.

    Returns:
        The folder of the experiment in which the bundle lay; None where no trial has completed yet, so that there is
        none in everything.

    Raises:
        FetchError: there is nothing to fetch, or `dest` cannot be made.
        BundleError: the bundle is damaged where it lies.
        StorageError: the experiment cannot be read, or the connection broke.
    """
    part = dest.with_name(f"{dest.name or '_'}.part")
    try:
        return _fetch_verified(experiment, dest, part, console, everything)
    except StorageError as error:
        kept = f"\nWhat has arrived is kept in {part}. Run the same command again to continue" if part.is_dir() else ""
        raise StorageError(f"{error}{kept}") from error
    except (OSError, sqlite3.Error) as error:  # of this machine: the storage's are StorageErrors
        raise FetchError(
            f"{part} cannot be written ({error}). Fix that, then run the same command again to continue"
        ) from error


def check_destination(dest: Path, everything: bool) -> None:
    """What can be said of a destination before anything is fetched.

    Raises:
        FetchError: there is something that cannot be what would be fetched.
    """
    if os.path.lexists(dest) and (everything or not (dest / CHECKSUMS).is_file()):
        raise FetchError(TAKEN.format(dest))


def is_transient(path: str) -> bool:
    """Whether a path in an experiment is none of what it takes to read or resume it."""
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
            prefix = "" if everything else f"{found}/"
            sizes = {path: size for path, size in experiment.files(prefix).items() if not is_transient(path)}
            targets = {path: _inside(part, path.removeprefix(prefix)) for path in sizes}
            _drop_others(part, {*targets.values(), part / LOCK, *(part / BEGUN).glob("*")})
            _fetch_all(experiment, targets, part / BEGUN, sizes, console)
            folder = part / found if everything and found else part
            wrong = list(checksum_errors(folder)) if found else []
            if not wrong:
                shutil.rmtree(part / BEGUN)
                part.rename(dest)
                Path(dest, LOCK).unlink(missing_ok=True)
                return found
            shutil.rmtree(folder, ignore_errors=True)
        # once more, from nothing: it was replaced while it was fetched, or begun by an attempt at something else
        if found in refused:
            name, fault = wrong[0]
            raise BundleError(
                f"{experiment.uri}/{found}/{name}: {fault}. The bundle is damaged where it lies, and nothing was "
                f"pulled; who owns it can delete {found}/ there and let --resume write it anew"
            )
        refused.add(found)


def _nothing(experiment: Experiment) -> str:
    if experiment.exists("settings.yaml"):
        return f"{experiment.name}: no trial has completed yet, so there is no model to pull. Try again later"
    names = experiment.siblings()
    there = f"there are: {', '.join(names)}" if names else "there are no experiments"
    return f"no experiment {experiment.name!r} in {experiment.uri.rpartition('/')[0]}; {there}"


def _same(folder: Path, experiment: Experiment, checksums: str) -> bool:
    own = folder / CHECKSUMS
    return own.is_file() and own.read_bytes() == experiment.read(checksums) and not any(checksum_errors(folder))


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Makes the folder, or takes up the one that an earlier pull left, for this process only.

    Raises:
        FetchError: another pull is at it, or it is none of a pull's.
    """
    mark = part / LOCK
    part.mkdir(parents=True, exist_ok=True)
    if not mark.exists() and any(part.iterdir()):
        raise FetchError(f"{part} exists, and no pull has made it. Move it away, or give another DEST")
    with mark.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"another pull is writing {part}. Wait for it, or give another DEST") from error
        yield


def _inside(part: Path, path: str) -> Path:
    """Where a file goes.

    Raises:
        FetchError: its name leads out of the folder.
    """
    if path.startswith("/") or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise FetchError(f"{path!r} points outside the experiment's folder, so nothing was pulled")
    return part / path


def _drop_others(part: Path, wanted: set[Path]) -> None:
    """Deletes what earlier attempts left and this one does not want, and links, which could lead anywhere."""
    for path in sorted(part.rglob("*"), reverse=True):  # a folder after what is in it
        if path.is_symlink() or (path.is_file() and path not in wanted):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _fetch_all(
    experiment: Experiment, targets: Mapping[str, Path], begun: Path, sizes: Mapping[str, int], console: Console
) -> None:
    """Fetches files side by side, under a progress bar."""
    stopped = threading.Event()
    with transfer_bar(console) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
        task = bar.add_task(experiment.name, total=sum(sizes.values()))

        def arrived(size: int) -> None:
            if stopped.is_set():
                raise CancelledError
            bar.advance(task, size)

        begun.mkdir(exist_ok=True)
        if COPY in targets:  # before the trials' files, so that those it knows as ended have all of theirs
            _fetch_study(experiment, targets[COPY])
            arrived(sizes[COPY])
        fetches = []
        for path, target in targets.items():
            if path != COPY:
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
    """Copies a file until the copy is what lies there, by size and time; one that is gone by then goes here too."""
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
            os.fsync(file.fileno())
        os.utime(part, ns=(written, written))
        part.replace(target)
        if fnmatchcase(target.name, STATES):
            return
    target.unlink(missing_ok=True)


def beginning(begun: Path, info: pyarrow.fs.FileInfo) -> Path:
    """Where what has come of this version of a file lies until all has."""
    return begun / hashlib.sha256(f"{info.path} {info.size} {info.mtime_ns}".encode()).hexdigest()


def _fetch_study(experiment: Experiment, target: Path) -> None:
    """Copies an SQLite study as it is between two writes of the search that may be at it."""
    if experiment.is_local:
        target.unlink(missing_ok=True)
        with closing(sqlite3.connect(Path(experiment.uri, COPY))) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
    elif (content := read_mirror(experiment)) is not None:
        target.write_bytes(content)


def transfer_bar(console: Console) -> Progress:
    """A progress bar for bytes, for as long as its context lasts; none where nobody looks."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
