"""Makes the report of a search again: one page with its question, its results and how far they hold.

python -m lungct_tune.report --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal

EXAMPLES = """\
examples:
  python -m lungct_tune.report 2026-11-23-054807-phantoms          from ./results, to ./report.html
  python -m lungct_tune.report s3://bucket/lungct_tune/NAME --out lung.html
  python -m lungct_tune.report NAME --data chest-ctscan            if the images are somewhere else now

While the search runs, the page shows the results so far.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("report", EXAMPLES)
    parser.add_argument("source", metavar="EXPERIMENT", help="an experiment's NAME, path or URI")
    parser.add_argument("--storage", metavar="URI", default="./results", help="where NAME is (./results)")
    parser.add_argument("--data", metavar="DIR", help="the images, or a URI (where they were for the search)")
    parser.add_argument("--table", metavar="FILE", type=Path, help="the table of the images (where it was)")
    parser.add_argument("--study", metavar="URL", help="the study's database, if the search had a --study")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="(./report.html)")
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked, terminal()))


def _run(asked: argparse.Namespace, console: Console) -> None:
    # imported only after the command line is checked, so that --help answers at once. The modules that draw come later,
    # when there is something to draw, because they import torch
    from lungct_tune.experiment.folder import locate
    from lungct_tune.experiment.results import read_results
    from lungct_tune.reporting.output_file import GENERATOR, check_output, write_whole

    check_output(asked.out, "--out", GENERATOR)
    experiment = locate(asked.source, asked.storage)
    found = read_results(experiment, asked.study)

    from lungct_tune.reporting.report_page import report_page
    from lungct_tune.reporting.test_section import Pictures, find_pictures

    copies = found.audit.copies.pairs if found.audit else []
    pictures = Pictures()
    if found.test or copies:
        pictures = find_pictures(found, asked.data, experiment.is_local, asked.table)
    page = report_page(experiment.name, found, pictures)
    write_whole(asked.out, "--out", page)
    if pictures.missing:
        console.print(f"without pictures: {pictures.missing}", style="yellow")
    console.print(f"{asked.out}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
