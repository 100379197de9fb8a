"""Where pages and figures are written: never over what a user made, and never into a bundle."""

from __future__ import annotations

from pathlib import Path

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import check_outside_bundles

GENERATOR = '<meta name="generator" content="lungct_tune">'
"""What every page has in its head, and by which it is known."""


def check_free(out: Path, flag: str, mark: str = GENERATOR) -> None:
    """Keeps what a user made from being written over.

    Args:
        flag: the option that named it.
        mark: what a file begins with that may be written over, since this program made it.

    Raises:
        UserError: something lies at `out` that is not ours, or it would be in a bundle.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the file a name: {flag} {out / 'NAME'}")
    check_outside_bundles(out, flag)
    if out.is_file() and mark.encode() not in out.read_bytes()[:4096]:
        raise UserError(f"{out} is there already, and was not made by lungct_tune; choose another {flag}")
