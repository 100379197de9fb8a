"""The folder of one search on its storage: where everything lies that must outlive a process."""

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

from lungct_tune.filesystem import StorageError, refusal, resolve_filesystem

CHUNK = 4 * 2**20
"""Bytes that are read at once: so many that an object store's latency hardly counts."""

VALID = "valid.npy"
"""In a trial's folder: what its best epoch says of validation."""

WRITTEN_IN_PLACE = ("s3", "gcs", "abfs")
"""File systems, by pyarrow's names, that need no folder made; an object there is seen when it is whole."""


@dataclass(frozen=True)
class Experiment:
    """`<storage>/<name>/`, on this machine, a shared file system or an object store.

    settings.yaml   the settings and the data's fingerprint, for `--resume`; space.yaml, the search space
    split.csv       every image: path, class, group, split
    audit.json      what the audit found in them
    study.db        the Optuna study (with remote storage: a copy, see study_copy.py)
    tune/           Ray Tune's own folder: results and TensorBoard events of each trial
    trials/0007/    last.pt: all that trial 7 needs to go on (last-1.pt, ...: its other folds); best.safetensors: its
                    best epoch's weights (of the first fold), and valid.npy: their probabilities (float32) for the
                    validation images (of all folds), in the order of split.csv
    slots/          Ray Train's runs of the slots (empty folders)
    final/          Ray Train's run of the final retraining
    *-images.npy    images too large for the object store, as the workers map them
    best/           the bundle; until it is there, so_far/000012/: one of the best trial after 12
    """

    uri: str
    """Absolute: a path, or a URI for `resolve_filesystem`."""

    @classmethod
    def at(cls, storage: str, name: str) -> Experiment:
        path = storage.removeprefix("file://")
        if "://" not in path:
            storage = str(Path(path).expanduser().resolve())
        return cls(f"{storage.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @cached_property
    def _place(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return (pyarrow.fs.LocalFileSystem(), self.uri) if self.is_local else resolve_filesystem(self.uri)

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """Travels with the experiment, and so do endpoint and region; every node needs credentials of its own."""
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

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Writes a file whole or not at all: what a reader finds under `path` is never half a file.

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
            self._write(part, content)
            if self.filesystem.type_name == "hdfs":  # where a move leaves what is in its way, and says nothing
                self.delete(path)
            self.filesystem.move(part, target)

    def _write(self, target: str, content: bytes | memoryview) -> None:
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(content)

    def read(self, path: str) -> bytes | None:
        """A file's content, or None where there is none."""
        with (
            self._refusals(f"read {path}"),
            suppress(FileNotFoundError),
            self.filesystem.open_input_file(f"{self.root}/{path}") as stream,
        ):
            return bytes(stream.read())
        return None

    def chunks(self, path: str, start: int = 0) -> Iterator[bytes]:
        """A file's content from a position on, a few MiB at a time.

        Raises:
            StorageError: there is no such file, or the storage refuses, also in the middle.
        """
        with self._refusals(f"read {path}"), self.filesystem.open_input_file(f"{self.root}/{path}") as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK):
                yield chunk

    def files(self, folder: str = "") -> dict[str, int]:
        """The files in a folder and those below it, as paths in the experiment, with their sizes in bytes."""
        selector = pyarrow.fs.FileSelector(f"{self.root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
        with self._refusals(f"list {folder or 'it'}"):
            found: Any = self.filesystem.get_file_info(selector)
        return {info.path.removeprefix(f"{self.root}/"): info.size for info in found if info.is_file}

    def delete(self, path: str) -> None:
        """Deletes a file if it is there."""
        with self._refusals(f"delete {path}"), suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{path}")

    def delete_folder(self, path: str) -> None:
        """Deletes a folder with all that is in it, if it is there."""
        with self._refusals(f"delete {path}"), suppress(FileNotFoundError):
            self.filesystem.delete_dir(f"{self.root}/{path}")

    def info(self, path: str = "") -> pyarrow.fs.FileInfo:
        """What lies under `path` (file, folder or nothing), its size and when it was written."""
        with self._refusals(f"look for {path or 'it'}"):
            found: Any = self.filesystem.get_file_info(f"{self.root}/{path}".rstrip("/"))
        return found

    def exists(self, path: str = "") -> bool:
        return bool(self.info(path).type != pyarrow.fs.FileType.NotFound)

    def siblings(self) -> list[str]:
        """The names of the experiments on the same storage.

        Raises:
            StorageError: the storage refuses, or has no such folder or bucket.
        """
        with self._refusals("look around"):
            beside: Any = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.root.rpartition("/")[0]))
            begun: Any = self.filesystem.get_file_info([f"{folder.path}/settings.yaml" for folder in beside])
        return sorted(info.path.split("/")[-2] for info in begun if info.is_file)


def trial_folder(number: int) -> str:
    """Where a trial's files lie in its experiment."""
    return f"trials/{number:04d}"


def state_file(number: int, fold: int) -> str:
    """Where the experiment has what a trial needs to go on with a fold; without folds there is only fold 0."""
    return f"{trial_folder(number)}/last{f'-{fold}' if fold else ''}.pt"


def locate(source: str, storage: str) -> Experiment:
    """The experiment that a path, a URI (its own or its bundle's) or a name on the storage means."""
    from lungct_tune.experiment.bundle import FOLDER

    source = source.rstrip("/").removesuffix(f"/{FOLDER}")
    if "://" not in source:
        if Path(source).name == source:
            return Experiment.at(storage, source)
        source = str(Path(source).expanduser().resolve())
    storage, _, name = source.rpartition("/")
    return Experiment.at(storage, name)
