"""Compares bundles, or what `evaluate` has written, on the same test images, paired by image.

python -m lungct_tune.compare --help
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.errors import UserError

EXAMPLES = """\
examples:
  python -m lungct_tune.compare results/ONE/best results/TWO/best
  python -m lungct_tune.compare one-judged two-judged three-judged --html compared.html

Each model is compared with the first. All must have been judged on the same test images: bundles of searches with the
same images, --split and --seed, or folders that lungct_tune.evaluate has written for the same images.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("compare", EXAMPLES)
    parser.add_argument("first", metavar="A", type=Path, help="the folder of the model that others are compared with")
    parser.add_argument("others", metavar="B", type=Path, nargs="+", help="the folder of another model")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as a page")
    words = sys.argv[1:] if argv is None else argv
    asked, command = parser.parse_args(words), shlex.join(["python", "-m", "lungct_tune.compare", *words])
    return exit_status(lambda: compare(asked, command, terminal()), "Nothing was written.")


def compare(asked: argparse.Namespace, command: str, console: Console) -> None:
    """Reads the figures, compares them, prints the tables and writes the page.

    Raises:
        CompareError: the models were not judged on the same images.
        BundleError: a bundle is altered, or its metrics.json cannot be read.
        UserError: the page cannot be written.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.evaluation.comparison import compare_models, read_judged
    from lungct_tune.experiment.bundle import CHECKSUMS, verify
    from lungct_tune.reporting.comparison_page import comparison_page, print_comparison
    from lungct_tune.reporting.output_file import check_free

    if asked.html:
        check_free(asked.html, "--html")
    folders = [asked.first, *asked.others]
    for folder in folders:
        if (folder / CHECKSUMS).exists():  # a bundle; what evaluate writes has no checksums
            verify(folder)
    judged = [read_judged(folder) for folder in folders]
    compared = compare_models(judged)
    print_comparison(judged, compared, console)
    if asked.html:
        try:
            asked.html.write_bytes(comparison_page(judged, compared, command))
        except OSError as error:
            raise UserError(f"{asked.html} cannot be written ({error}); choose another --html") from error
        console.print(f"written: {asked.html}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
