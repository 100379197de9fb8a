"""What a data set and its split are worth, before a single GPU hour is spent on them.

python -m lungct_tune.audit --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import numpy as np

    from lungct_tune.data import ImageSet
    from lungct_tune.settings import Settings

EXAMPLES = """\
examples:
  python -m lungct_tune.audit --data chest-ctscan                        the published folders
  python -m lungct_tune.audit --data chest-ctscan --html audit.html      with the pairs of copies to look at
  python -m lungct_tune.audit --data chest-ctscan --split grouped        the split that a search makes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m lungct_tune.audit",
        description="Look for copies, conflicts, shortcuts and leaks in images and their split.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="images, as for lungct_tune.search; or a URI")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page, with the copies as pairs of thumbnails"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    parser.add_argument("--split", metavar="grouped|official", help="(official where there are its folders)")
    parser.add_argument("--permuted", action="store_true", help="also learn permuted labels: slower; can prove a leak")
    parser.add_argument("--seed", metavar="N", help="of the grouped split (0)")
    parser.add_argument("--image-size", metavar="N", help="that the images are read at (224)")
    parser.add_argument("--class-map", metavar="MAP", help="other class names: FOLDER=CLASS[,...]")
    parser.add_argument("--skip-unreadable", action="store_true", help="go on without the files that cannot be read")
    try:
        return _run(vars(parser.parse_args(argv)))
    except KeyboardInterrupt:
        return 130


def _run(asked: dict[str, object]) -> int:
    from lungct_tune.audit_view import print_audit, write_page
    from lungct_tune.bundle import as_json
    from lungct_tune.data import DataError, fetch_images, read_images
    from lungct_tune.data.audit import audit_images
    from lungct_tune.settings import SettingsError, validate

    page, figures, permuted = asked.pop("html", None), asked.pop("json", None), bool(asked.pop("permuted", False))
    try:
        settings = validate(asked).for_data()
        assert settings.data and settings.image_size  # --data is required
        root = fetch_images(settings.data) if isinstance(settings.data, str) else settings.data
        images = read_images(
            root, settings.image_size, class_map=settings.class_map, skip_unreadable=settings.skip_unreadable
        )
        how, split = _split(images, settings, "split" in asked)
        audit = audit_images(images, split, how, permuted=permuted)
        print_audit(audit, Console(highlight=False))
        if isinstance(figures, Path):
            figures.write_bytes(as_json(audit))
        if isinstance(page, Path):
            write_page(audit, root, page)
    except (SettingsError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _split(images: ImageSet, settings: Settings, asked: bool) -> tuple[str, np.ndarray]:
    """The split to audit and its name: the folders as they are, with or without test, unless asked otherwise.

    Raises:
        DataError: the official split is asked for where there are no folders of one, or a grouped one cannot be made.
    """
    from lungct_tune.data import DataError, split_images

    folders = images.table["folder"].to_numpy(dtype=str)
    has_folders = len(set(folders)) > 1
    if settings.split == "official" and not has_folders:
        raise DataError(f"{images.root} has no two of the folders train, valid and test; choose --split grouped")
    if has_folders and (settings.split == "official" or not asked):
        return "official", folders
    return "grouped", split_images(images, "grouped", settings.seed)


if __name__ == "__main__":
    sys.exit(main())
