"""Compares searches on the same validation images, and models on the same test images.

python -m lungct_tune.compare --help
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, printable, terminal
from lungct_tune.errors import UserError
from lungct_tune.stopping import stop_says

if TYPE_CHECKING:
    from lungct_tune.evaluation.comparison import Judged
    from lungct_tune.evaluation.search_curves import SearchCurve
    from lungct_tune.experiment.folder import Experiment

EXAMPLES = """\
examples:
  python -m lungct_tune.compare results/ONE results/TWO                    two searches, finished or not
  python -m lungct_tune.compare results/ONE s3://bucket/lungct_tune/TWO --html compared.html
  python -m lungct_tune.compare results/ONE/best s3://bucket/TWO/best      two models
  python -m lungct_tune.compare one-judged two-judged three-judged         what evaluate has written

Searches are compared by their best validation figure after as many trials and after as many hours. Their trials must
have been evaluated on the same images: the same data, --image-size, --split, --split-seed and --folds.

Each model is compared with the first. All must have been judged on the same test images: bundles of searches with the
same images, --split and --split-seed, or folders that lungct_tune.evaluate has written for the same images.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("compare", EXAMPLES)
    parser.add_argument("first", metavar="A", help="the folder or URI of a search, or of a model")
    parser.add_argument("others", metavar="B", nargs="+", help="others of the same kind, which are compared with A")
    parser.add_argument("--study", metavar="URL", help="the studies' database, if the searches had a --study")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as a page")
    words = sys.argv[1:] if argv is None else argv
    asked = parser.parse_args(words)
    command = printable(shlex.join(["python", "-m", "lungct_tune.compare", *words]))  # without a database's password
    return exit_status(lambda: compare(asked, command, terminal()), "Nothing was written.")


def compare(asked: argparse.Namespace, command: str, console: Console) -> None:
    """Reads the figures, compares them, prints the tables and writes the page.

    Raises:
        BundleError: a bundle is altered, or its metrics.json cannot be read.
        NothingHeld, StorageError: a search cannot be read.
        UserError: trials or models were not evaluated on the same images, or the page cannot be written.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.evaluation.comparison import compare_models, read_judged
    from lungct_tune.experiment.bundle import bundle_to_give
    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.experiment.kept_settings import SETTINGS
    from lungct_tune.reporting.comparison_page import comparison_page, print_comparison, print_searches
    from lungct_tune.reporting.output_file import GENERATOR, check_output, write_whole

    if asked.html:
        check_output(asked.html, "--html", GENERATOR)
    sources = [asked.first, *asked.others]
    folders = [Experiment.from_uri(source) for source in sources]
    are_searches = [folder.exists(SETTINGS) for folder in folders]
    curves: list[SearchCurve] = []
    if all(are_searches):
        curves, judged = _read_searches(sources, folders, asked.study)
        print_searches(curves, console)
    elif any(are_searches):
        search, model = (sources[are_searches.index(kind)] for kind in (True, False))
        give = bundle_to_give(folders[sources.index(search)], search)
        raise UserError(f"{search} is a search and {model} is not; to compare the models, {give}")
    else:
        judged = [read_judged(source, folder) for source, folder in zip(sources, folders, strict=True)]
    compared = compare_models(judged) if len(judged) > 1 else []
    if compared:
        print_comparison(judged, compared, console)
    if asked.html:
        write_whole(asked.html, "--html", comparison_page(curves, judged, compared, command))
        with stop_says(f"written: {asked.html}"):
            console.print(f"written: {asked.html}")


def _read_searches(
    sources: Sequence[str], folders: Sequence[Experiment], study: str | None
) -> tuple[list[SearchCurve], list[Judged]]:
    """The curves of searches, and the final models of those that have ended."""
    from lungct_tune.evaluation.comparison import judged_model
    from lungct_tune.evaluation.search_curves import check_comparable, search_curve
    from lungct_tune.experiment.results import read_results

    found = [(source, read_results(folder, study)) for source, folder in zip(sources, folders, strict=True)]
    curves = [search_curve(name, results) for name, results in found]
    check_comparable(curves)
    judged = [
        judged_model(name, results.bundle.predictions, results.test)
        for name, results in found
        if results.bundle and results.bundle.predictions and results.test
    ]
    return curves, judged


if __name__ == "__main__":
    sys.exit(main())
