"""Checks output files: never overwrites a user's file, and never writes into a bundle."""

from __future__ import annotations

from pathlib import Path

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import check_outside_bundles

GENERATOR = '<meta name="generator" content="lungct_tune">'
"""A tag in the head of every page, by which the program recognises its own pages."""


def check_free(out: Path, flag: str, mark: str = GENERATOR) -> None:
    """Checks that an output file can be written without overwriting a user's file.

    Args:
        flag: the option that named the file.
        mark: text near the start of files of this program, which may be overwritten.

    Raises:
        UserError: `out` is a folder or a file that this program did not make, or it is in a bundle.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the file a name: {flag} {out / 'NAME'}")
    check_outside_bundles(out, flag)
    if out.is_file() and mark.encode() not in out.read_bytes()[:4096]:
        raise UserError(f"{out} is there already, and was not made by lungct_tune; choose another {flag}")


def check_new(out: Path, flag: str) -> None:
    """Checks that there is no output file or folder yet, and that it is in no bundle.

    Args:
        flag: the option that named it.

    Raises:
        UserError: there is one, or it is in a bundle.
    """
    check_outside_bundles(out, flag)
    if out.exists():
        raise UserError(f"{out} is there already; choose another {flag}, or move it away")
