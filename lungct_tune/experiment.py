"""The folder of one search on its storage: where everything lies that must outlive a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.fs


class StorageError(RuntimeError):
    """The storage cannot be used: the message names the URI, what failed and what to do."""


@dataclass(frozen=True)
class Experiment:
    """`<storage>/<name>/`, on this machine, a shared file system or an object store.

    settings.yaml   the settings and the data's fingerprint, for `--resume`; space.yaml, the search space
    split.csv       every image: path, class, group, split
    study.db        the Optuna study (with remote storage: on the machine that runs the search)
    tune/           Ray Tune's own folder: results and TensorBoard events of each trial
    trials/0007/    last.pt: all that trial 7 needs to go on; best.safetensors: its best epoch's weights
    slots/          Ray Train's runs of the slots (empty folders)
    final/          Ray Train's run of the final retraining
    *-images.npy    images too large for the object store, as the workers map them
    best/           the bundle
    """

    uri: str
    """Absolute: a path, or a URI that pyarrow understands (file, s3, gs, hdfs)."""

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
    def _filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        try:
            if self.is_local:
                return pyarrow.fs.LocalFileSystem(), self.uri
            filesystem, path = pyarrow.fs.FileSystem.from_uri(self.uri)
        except Exception as error:  # pyarrow raises many kinds, by store
            raise StorageError(f"--storage {self.uri}: not understood ({error})") from error
        return filesystem, path

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}  # a file system does not travel; every process opens its own

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.uri}: cannot {what} ({error}); check that the folder or bucket exists, that this machine "
                "has the right to, and that there is room"
            ) from error

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Writes a file whole or not at all: what a reader finds under `path` is never half a file.

        Raises:
            StorageError: the storage refuses.
        """
        filesystem, root = self._filesystem
        target = f"{root}/{path}"
        with self._refusals(f"write {path}"):
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            # an object store shows an object when it is complete; a file system needs the rename
            written = f"{target}.{uuid4().hex[:8]}.part" if self.is_local else target
            with filesystem.open_output_stream(written) as stream:
                stream.write(content)
            if written != target:
                filesystem.move(written, target)

    def read(self, path: str) -> bytes | None:
        """A file's content, or None where there is none."""
        filesystem, root = self._filesystem
        with (
            self._refusals(f"read {path}"),
            suppress(FileNotFoundError),
            filesystem.open_input_file(f"{root}/{path}") as stream,
        ):
            return bytes(stream.read())
        return None

    def delete(self, path: str) -> None:
        """Deletes a file if it is there."""
        filesystem, root = self._filesystem
        with self._refusals(f"delete {path}"), suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{path}")

    def exists(self, path: str = "") -> bool:
        filesystem, root = self._filesystem
        with self._refusals(f"look for {path or 'it'}"):
            info: Any = filesystem.get_file_info(f"{root}/{path}".rstrip("/"))
        return bool(info.type != pyarrow.fs.FileType.NotFound)


def trial_folder(number: int) -> str:
    """Where a trial's files lie in its experiment."""
    return f"trials/{number:04d}"
