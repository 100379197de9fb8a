"""Copies images from an object store or another machine into the cache, and keeps the copy up to date."""

from __future__ import annotations

import fcntl
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.fs

from lungct_tune.data.cache import default_cache, require_space
from lungct_tune.data.folders import DataError
from lungct_tune.display import tracked
from lungct_tune.files import local_path
from lungct_tune.filesystem import StorageError, refusal, resolve_filesystem

DOWNLOADS = 16
"""Files fetched at the same time."""


def fetch_images(uri: str | Path, cache: Path | None = None) -> Path:
    """Returns a local folder of the images: a path or file:// as it is, or a copy of all files below another URI.

    Fetches new and changed files, and deletes files that are no longer at the URI. A file is unchanged if its size and
    its modification time are the same. After an interrupted run, the files that were fetched are kept.

    Raises:
        DataError: the URI cannot be read, has no files, or the cache cannot hold them.
    """
    if isinstance(uri, Path):
        return uri
    if (folder := local_path(uri)) is not None:
        return folder
    try:
        filesystem, root = resolve_filesystem(uri)
        found: Any = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except StorageError as error:
        raise DataError(f"--data {error}") from error
    except Exception as error:  # fsspec's file systems raise any kind
        raise DataError(f"--data {refusal(uri, 'list it', error)}") from error
    remote_files = {info.path.removeprefix(root).lstrip("/"): info for info in found if info.is_file}
    if not remote_files:
        raise DataError(f"--data {uri}: there are no files; it must contain the images' class folders")
    name = f"{root.rpartition('/')[2]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    copy = (cache or default_cache()) / "data" / name
    if outside := [path for path in remote_files if not (copy / path).resolve().is_relative_to(copy.resolve())]:
        raise DataError(f"--data {uri}: {outside[0]!r} cannot be a file's name here; rename it at the source")

    def fetch(path: str) -> None:
        part = copy / f"{path}.{uuid4().hex[:8]}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.fs.copy_files(remote_files[path].path, str(part), source_filesystem=filesystem, use_threads=False)
        os.utime(part, ns=(remote_files[path].mtime_ns or 0,) * 2)
        part.replace(copy / path)

    require_space(copy, 0)  # the lock is beside the copy
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # searches that start at the same time share the copy
        missing = [path for path, info in remote_files.items() if not _is_same(copy / path, info)]
        require_space(copy, sum(remote_files[path].size for path in missing))
        for path in sorted(copy.rglob("*"), reverse=True):  # the content of a folder comes before the folder
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif not path.is_dir() and path.relative_to(copy).as_posix() not in remote_files:
                path.unlink()
        what = f"Fetching {len(missing)} of {len(remote_files)} files"
        try:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(tracked(pool.map(fetch, missing), what, len(missing), shown=bool(missing)))
        except Exception as error:
            raise DataError(f"--data {refusal(uri, 'fetch it', error)}") from error
    return copy


def _is_same(copy: Path, info: pyarrow.fs.FileInfo) -> bool:
    if not copy.is_file():
        return False
    stat = copy.stat()
    return bool(stat.st_size == info.size and stat.st_mtime_ns == (info.mtime_ns or 0))
