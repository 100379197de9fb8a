"""The folder of one search on its storage: it has every file that must outlive a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow
import pyarrow.fs

from lungct_tune.files import local_path, open_file
from lungct_tune.filesystem import StorageError, refusal, resolve_filesystem

CHUNK = 4 * 2**20
"""Bytes that are read at once. With this size an object store's latency hardly counts."""

MOST_BYTES = 2**30
"""Of a file that is read whole. A bundle's model has 100 MB."""

MOST_STATE_BYTES = 32 * 2**30
"""Of a trial's state: up to 0.4 GB for each of at most 50 folds."""

SPLIT = "split.csv"
"""The split and the fold of each image, see `lungct_tune.data.split.DataSplit.as_csv`."""

TRIAL_WEIGHTS = "model.safetensors"
"""In a trial's folder: its weights."""

VALID = "valid.npy"
"""In a trial's folder: its predictions for validation."""

WRITTEN_IN_PLACE = ("s3", "gcs", "abfs")
"""Object stores, by pyarrow's names. They need no folders, and an object appears only when it is complete."""


@dataclass(frozen=True)
class Experiment:
    """`<storage>/<name>/`, on this machine, a shared file system or an object store.

    settings.yaml   the settings, the sha256 of the next two files, and the data's fingerprint, for `--resume`
    space.yaml      the search space
    split.csv       every image: path, class, group, whether its patient is known, split
    audit.json      the audit of these images
    study.journal   the Optuna study, a line for each change. With remote storage it is in `local_folder`, and study/
                    has a copy in parts, see study_mirror.py. Older searches have study.db, a SQLite database
    tune/           TensorBoard's events of each trial. With remote storage those of a trial that runs are in
                    `local_folder`
    trials/0007/    state-0012.pt: the state from which trial 7 continues after epoch 12 (state-0012-1.pt, ...: of its
                    other workers, if each trains folds of its own); model.safetensors: its weights (of the first
                    fold); valid.npy: its probabilities (float32) for the validation images (of all folds), in the
                    order of split.csv. Only the best 20 trials have the last two
    slots/          Ray Train's runs of the slots (empty folders)
    final/          the final retraining: its state, weights and predictions
    *-images.npy    images that are too large for Ray's object store; the workers memory-map them
    running.json    on remote storage: the machine that runs the search, see lock.py
    best/           the bundle; before it is written, so_far/000012/: a bundle of the best of the first 12 trials
    """

    uri: str
    """Absolute: a path, or a URI for `resolve_filesystem`."""

    @classmethod
    def at(cls, storage: str, name: str) -> Experiment:
        return cls(f"{cls.from_uri(storage).uri.rstrip('/')}/{name}")

    @classmethod
    def from_uri(cls, source: str) -> Experiment:
        """The experiment, or the bundle, in the folder at a path or URI."""
        path = local_path(source)
        return cls(str(path.resolve()) if path else source.rstrip("/"))

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def local_folder(self) -> Path:
        """The folder for files that this machine appends to: the experiment's own, or one beside for remote storage."""
        return Path(self.uri) if self.is_local else Path("results", self.name).resolve()

    @cached_property
    def _place(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return (pyarrow.fs.LocalFileSystem(), self.uri) if self.is_local else resolve_filesystem(self.uri)

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """The experiment's file system, with its endpoint and region. Every node needs credentials of its own."""
        return self._place[0]

    @property
    def root(self) -> str:
        """The experiment's path in its file system."""
        return self._place[1]

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:  # fsspec's file systems raise any kind
            raise StorageError(refusal(self.uri, what, error)) from error

    @contextmanager
    def _deletion(self, path: str) -> Iterator[None]:
        """Raises FileNotFoundError if `path` is deleted while it is read. S3 raises another error then."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            with suppress(StorageError):  # the error of a broken line is kept
                if not self.exists(path):
                    raise FileNotFoundError(path) from error
            raise

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Writes a file. A reader never finds half a file under `path`.

        Raises:
            StorageError: the storage refuses.
        """
        target = f"{self.root}/{path}"
        with self._refusals(f"write {path}"):
            if self.filesystem.type_name in WRITTEN_IN_PLACE:
                self._write(target, content)
                return
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            part = f"{target}.{uuid4().hex[:8]}.part"
            try:
                self._write(part, content)
                if self.filesystem.type_name == "hdfs":  # its move silently does not replace an existing file
                    self.delete(path)
                self.filesystem.move(part, target)
            except BaseException:  # what is left of a state would keep a full disk full
                with suppress(Exception):
                    self.filesystem.delete_file(part)
                raise

    def _write(self, target: str, content: bytes | memoryview) -> None:
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(content)

    def read(self, path: str, most: int = MOST_BYTES) -> bytes | None:
        """Returns a file's content, or None if there is no such file.

        Args:
            most: bytes that are read.

        Raises:
            StorageError: the storage refuses, or it is no regular file of at most so many bytes.
        """
        with self._refusals(f"read {path}"), suppress(FileNotFoundError), self._deletion(path):
            if self.is_local:
                with open_file(Path(self.uri, path), most) as file:
                    return file.read()
            with self.filesystem.open_input_file(f"{self.root}/{path}") as stream:
                if stream.size() > most:
                    raise OSError(f"{stream.size():,} bytes; at most {most:,} are read")
                return bytes(stream.read())
        return None

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yields a file's content from byte `start` on, a few MiB at a time.

        Raises:
            StorageError: there is no such file, or the storage refuses, possibly after some chunks.
        """
        file = f"{self.root}/{path}"
        with self._refusals(f"read {path}"), self._deletion(path), self.filesystem.open_input_file(file) as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK):
                yield chunk

    def files(self, folder: str = "") -> dict[str, int]:
        """Lists the files in a folder and its subfolders: paths in the experiment, and sizes in bytes."""
        selector = pyarrow.fs.FileSelector(f"{self.root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
        with self._refusals(f"list {folder or 'it'}"):
            found: Any = self.filesystem.get_file_info(selector)
        return {info.path.removeprefix(f"{self.root}/"): info.size for info in found if info.is_file}

    def delete(self, path: str) -> None:
        """Deletes a file if it is there."""
        with self._refusals(f"delete {path}"), suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{path}")

    def delete_folder(self, path: str) -> None:
        """Deletes a folder and its content, if it is there."""
        with self._refusals(f"delete {path}"), suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.root}/{path}")

    def info(self, path: str = "") -> pyarrow.fs.FileInfo:
        """Returns the type of `path` (file, folder or not found), its size and the time it was written."""
        with self._refusals(f"look for {path or 'it'}"):
            found: Any = self.filesystem.get_file_info(f"{self.root}/{path}".rstrip("/"))
        return found

    def exists(self, path: str = "") -> bool:
        return bool(self.info(path).type != pyarrow.fs.FileType.NotFound)

    def similar(self) -> str:
        """The words for a message that name an experiment on the same storage with a similar name; empty if none."""
        from lungct_tune.cli import suggestion  # which workers do not need

        if Path(self.name, "settings.yaml").is_file():  # as `pull --all` makes it, called by its name
            return f" (did you mean ./{self.name}?)"
        with suppress(StorageError):
            return suggestion(self.name, self.siblings())
        return ""

    def siblings(self) -> list[str]:
        """The names of the experiments on the same storage.

        Raises:
            StorageError: the storage refuses.
        """
        selector = pyarrow.fs.FileSelector(self.root.rpartition("/")[0], allow_not_found=True)
        with self._refusals("look around"):
            beside: Any = self.filesystem.get_file_info(selector)
            settings: Any = self.filesystem.get_file_info([f"{folder.path}/settings.yaml" for folder in beside])
        return sorted(info.path.split("/")[-2] for info in settings if info.is_file)


TRIALS = "trials"
"""The folder of all trials' folders in an experiment."""


def trial_folder(number: int) -> str:
    """The folder of a trial's files in its experiment."""
    return f"{TRIALS}/{number:04d}"


STATE = ".pt"
"""The suffix of the files from which a trial continues."""


def state_file(number: int, epoch: int, rank: int = 0) -> str:
    """The file of the state from which a worker continues a trial after `epoch`."""
    return f"{trial_folder(number)}/state-{epoch:04d}{f'-{rank}' if rank else ''}{STATE}"


def old_state_file(number: int, fold: int) -> str:
    """The file in which version 0.1 kept the state of a fold. Without folds there was only fold 0."""
    return f"{trial_folder(number)}/last{f'-{fold}' if fold else ''}{STATE}"


def delete_states(experiment: Experiment, number: int) -> None:
    """Deletes all states of a trial.

    Raises:
        StorageError: the storage refuses.
    """
    for path in experiment.files(trial_folder(number)):
        if path.endswith(STATE):
            experiment.delete(path)


def locate(source: str, storage: str) -> Experiment:
    """The experiment for a path, a URI (its own or its bundle's) or a name on the storage."""
    from lungct_tune.experiment.bundle import FOLDER

    source = source.rstrip("/")
    if Path(source).name == source != "..":
        return Experiment.at(storage, source)
    itself, search = Experiment.from_uri(source), source.removesuffix(f"/{FOLDER}")
    return itself if search == source or itself.exists("settings.yaml") else locate(search, storage)
