"""Audits a data set and its split, before any training: copies, conflicts, shortcuts and leaks.

python -m lungct_tune.audit --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lungct_tune.config.settings import Settings
    from lungct_tune.data import ImageSet

EXAMPLES = """\
examples:
  python -m lungct_tune.audit --data chest-ctscan                        the published folders
  python -m lungct_tune.audit --data chest-ctscan --html audit.html      a page that shows the pairs of copies
  python -m lungct_tune.audit --data chest-ctscan --split grouped        the split that a search makes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("audit", EXAMPLES, argument_default=argparse.SUPPRESS)
    parser.add_argument("--data", metavar="DIR", required=True, help="images, as for lungct_tune.search; or a URI")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page, with the copies as pairs of thumbnails"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--split", metavar="grouped|official", help="the split to audit (official if its folders exist)"
    )
    parser.add_argument("--permuted", action="store_true", help="also train on permuted labels: slow; can prove a leak")
    parser.add_argument("--split-seed", metavar="N", help="the seed of the grouped split (0)")
    parser.add_argument("--split-file", metavar="FILE", help="instead, a split of your own, as for lungct_tune.search")
    parser.add_argument("--image-size", metavar="N", help="width and height at which images are read, in pixels (224)")
    parser.add_argument("--class-map", metavar="MAP", help="other class names: FOLDER=CLASS[,...]")
    parser.add_argument("--table", metavar="FILE", help="a CSV of path (or SeriesInstanceUID), class and group")
    parser.add_argument(
        "--window", metavar="WINDOW", help="of CT values in DICOM files: lung, mediastinum, CENTER,WIDTH"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that cannot be read")
    arguments = vars(parser.parse_args(argv))
    return exit_status(lambda: _run(arguments, terminal()))


def _run(arguments: dict[str, Any], console: Console) -> None:
    from lungct_tune.config.settings import validate

    page, figures, permuted = arguments.pop("html", None), arguments.pop("json", None), arguments.pop("permuted", False)
    if page and figures and page.resolve() == figures.resolve():
        raise UserError(f"--html and --json are the same file, {page}; give two")
    settings = validate(arguments).for_data()
    # imported after the settings are validated, so that --help and error messages come at once
    from lungct_tune.auditing.audit import audit_images
    from lungct_tune.data import fetch_images, read_images
    from lungct_tune.experiment.bundle import as_json
    from lungct_tune.reporting.audit_page import audit_page
    from lungct_tune.reporting.console import print_audit
    from lungct_tune.reporting.output_file import GENERATOR, check_output, write_whole

    if page:
        check_output(page, "--html", GENERATOR)
    if figures:
        check_output(figures, "--json", '"verdict": {')
    assert settings.data and settings.image_size  # --data is required
    root = fetch_images(settings.data)
    images = read_images(
        root,
        settings.image_size,
        class_map=settings.class_map,
        skip_unreadable=settings.skip_unreadable,
        table=settings.table,
        window=settings.ct_window,
    )
    images, how, split = _split(images, settings, "split" in arguments)
    audit = audit_images(images, split, how, permuted=permuted)
    print_audit(audit, console)
    if figures:
        write_whole(figures, "--json", as_json(audit.as_dict()))
    if page:
        write_whole(page, "--html", audit_page(audit, root))


def _split(images: ImageSet, settings: Settings, asked: bool) -> tuple[ImageSet, str, np.ndarray]:
    """The images, the name of the split to audit, and the split. A split file may give the images other groups.

    Without --split or --split-file it is that of the split folders, if there are at least two, or else a grouped split.
    Images that cannot be split are audited as one part, unless --split is given.

    Raises:
        DataError: --split official is given without split folders, or --split grouped and there are too few groups, or
            the split file cannot be used.
    """
    import numpy as np

    from lungct_tune.data import DataError, split_images
    from lungct_tune.data.split import UNSPLIT, read_split

    if settings.split_file:
        images, split = read_split(images, settings.split_file)
        return images, "file", split
    folders = images.table["folder"].to_numpy(dtype=str)
    has_folders = len(set(folders)) > 1
    if settings.split == "official" and not has_folders:
        raise DataError(
            f"{images.root} has fewer than two of the folders train, valid and test; choose --split grouped"
        )
    if has_folders and (settings.split == "official" or not asked):
        return images, "official", folders
    try:
        return images, "grouped", split_images(images, "grouped", settings.split_seed)
    except DataError:
        if asked:
            raise
        return images, "no", np.full(len(folders), UNSPLIT)


if __name__ == "__main__":
    sys.exit(main())
