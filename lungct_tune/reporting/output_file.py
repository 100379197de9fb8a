"""Checks and writes outputs: never over a user's file, and never into a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import check_outside_bundles

GENERATOR = '<meta name="generator" content="lungct_tune">'
"""A tag in the head of every page, by which the program recognises its own pages."""


def check_output(out: Path, flag: str, mark: str = "", *, is_folder: bool = False) -> None:
    """Checks before any work that an output can be written, without overwriting what a user has.

    Args:
        flag: the option that named it.
        mark: text near the start of files of this program, which may be overwritten. Without it, none may be.
        is_folder: it is a folder to make, with those above it.

    Raises:
        UserError: it is there already, it is in a bundle, or there is no folder for it.
    """
    if out.is_dir() and not is_folder:
        raise UserError(f"{out} is a folder; give the file a name: {flag} {out / 'NAME'}")
    check_outside_bundles(out, flag)
    if out.exists() and not (mark and _begins_with(mark, out)):
        whose = ", and was not made by lungct_tune" if mark else ""
        raise UserError(f"{out} is there already{whose}; choose another {flag}, or move it away")
    if not is_folder and not out.absolute().parent.is_dir():
        raise UserError(f"{flag} {out}: there is no folder {out.parent}; make it first")


def _begins_with(mark: str, out: Path) -> bool:
    if not out.is_file():
        return False  # a device
    with out.open("rb") as file:
        return mark.encode() in file.read(4096)


@contextmanager
def written_whole(out: Path, flag: str) -> Iterator[Path]:
    """The path at which to write a file or a new folder. It gets its name when it is whole: a stop leaves nothing.

    Raises:
        UserError: it cannot be written.
    """
    try:
        place = out.resolve()  # where a link leads to
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=place.parent) as scratch:
            new = Path(scratch, place.name)
            yield new
            new.rename(place)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another {flag}") from error


def write_whole(out: Path, flag: str, content: bytes) -> None:
    """Writes a file, see `written_whole`."""
    with written_whole(out, flag) as new:
        new.write_bytes(content)
