"""Opens the files that a user names, without waiting for a pipe, reading a device or filling the memory."""

from __future__ import annotations

import os
import stat
import tempfile
from io import BufferedReader
from os.path import expanduser  # Path.expanduser raises an error for a user who does not exist
from pathlib import Path
from urllib.parse import unquote

MOST_TEXT = 10_000_000
"""Bytes of a settings file, a search space or a table."""


def local_path(address: str) -> Path | None:
    """The path that a user names, also with ~, or as file:// with %20 for a space; None for any other URI."""
    if address.startswith("file://"):
        return Path(unquote(address.removeprefix("file://")))
    return None if "://" in address else Path(expanduser(address))


def open_file(path: Path, most: int) -> BufferedReader:
    """Opens a regular file of at most `most` bytes for reading.

    Raises:
        OSError: there is no such file, it may not be read, it is no regular file, or it is larger.
    """
    # without O_NONBLOCK, opening a named pipe waits until somebody writes to it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    raise OSError(f"{status.st_size:,} bytes; at most {most:,} are read")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: see `open_file`.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_file(path, MOST_TEXT) as file:
        return file.read().decode("utf-8-sig")


def replace_file(file: Path, content: bytes) -> None:
    """Writes a file that only the user may read. A reader finds the earlier content or this, never a part of it.

    Raises:
        OSError: its folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        new = Path(scratch, file.name)
        new.touch(0o600)
        new.write_bytes(content)
        new.replace(file)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8. Python reads the other bytes of a name as surrogates."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False
