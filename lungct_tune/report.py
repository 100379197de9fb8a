"""The report: one page on what was asked, what was found and what it is worth, and the bundle's model card.

python -m lungct_tune.report --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lungct_tune.pull import locate

if TYPE_CHECKING:
    from lungct_tune.findings import Findings
    from lungct_tune.page import Pictures

EXAMPLES = """\
examples:
  python -m lungct_tune.report 2026-11-23-054807-phantoms          from ./results, to ./report.html
  python -m lungct_tune.report s3://bucket/lungct_tune/NAME --out lung.html
  python -m lungct_tune.report NAME --data chest-ctscan            where the images lie elsewhere than they did

While the search runs, the page tells what is known so far.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m lungct_tune.report",
        description="Make the report of a search again, or of one that has not ended.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="EXPERIMENT", help="an experiment's NAME, path or URI")
    parser.add_argument("--storage", metavar="URI", default="./results", help="where NAME lies (./results)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the images (where they were for the search)")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="(./report.html)")
    try:
        return _run(parser.parse_args(argv))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _run(asked: argparse.Namespace) -> int:
    # imported when the command line is known to be right, so that --help answers at once
    from lungct_tune.findings import NothingHeld, read_findings
    from lungct_tune.page import Pictures, report_page
    from lungct_tune.storage import StorageError

    console = Console(highlight=False)
    try:
        _check_free(asked.out)
        experiment = locate(asked.source, asked.storage)
        found = read_findings(experiment)
        pictures = Pictures() if found.test is None else find_pictures(found, asked.data)
        page = report_page(experiment.name, found, pictures)
        asked.out.write_bytes(page)
    except (NothingHeld, StorageError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {asked.out} cannot be written ({error}); choose another --out", file=sys.stderr)
        return 2
    if pictures.missing:
        console.print(f"without pictures: {pictures.missing}", style="yellow", soft_wrap=True, markup=False)
    console.print(f"{asked.out}: {len(page) / 1e6:.1f} MB", soft_wrap=True, markup=False)
    return 0


def _check_free(out: Path) -> None:
    """Raises FileExistsError where something lies at `out` that is not a report."""
    from lungct_tune.page import GENERATOR

    if out.is_dir():
        raise FileExistsError(f"{out} is a folder; give the page a name: --out {out / 'report.html'}")
    if out.exists() and GENERATOR.encode() not in out.read_bytes()[:4096]:
        raise FileExistsError(f"{out} is there already, and is no report of lungct_tune; choose another --out")


def find_pictures(found: Findings, data: Path | None) -> Pictures:
    """The images of a search, from `data` or where the search had them; why not, if they are not there."""
    from lungct_tune.data import DataError, fetch_images, make_phantoms, read_images
    from lungct_tune.data.cache import default_cache
    from lungct_tune.page import Pictures

    settings = found.settings
    root = data or settings["data"] or make_phantoms(default_cache(), settings["seed"])
    try:
        images = read_images(
            fetch_images(str(root)) if "://" in str(root) else Path(root),
            settings["image_size"],
            class_map=settings["class_map"],
            skip_unreadable=settings["skip_unreadable"],
        )
    except DataError as error:
        return Pictures(missing=f"{error}\nSay where the images are: --data DIR")
    if images.fingerprint != settings["fingerprint"]:
        return Pictures(missing=f"the images in {root} are not those of the search; say where they are: --data DIR")
    return Pictures(images)


if __name__ == "__main__":
    sys.exit(main())
