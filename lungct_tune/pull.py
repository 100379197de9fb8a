"""Fetches the best model of a search to a local folder, verifies it, and prints its figures.

python -m lungct_tune.pull --help
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lungct_tune.cli import command_line, command_words, exit_status, terminal

if TYPE_CHECKING:
    from lungct_tune.experiment.folder import Experiment

EXAMPLES = """\
examples:
  python -m lungct_tune.pull 2026-11-23-054807-phantoms               from ./results, to ./2026-11-23-054807-phantoms
  python -m lungct_tune.pull s3://bucket/lungct_tune/NAME model       from an object store, to ./model
  python -m lungct_tune.pull NAME --cluster clusters/onprem.yaml      from the disk of that cluster's head
  python -m lungct_tune.pull s3://bucket/lungct_tune/NAME --all       the trials and the study too

While the search runs, this pulls its best trial so far. A pull that was interrupted continues when it is run again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("pull", EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="an experiment's NAME, path or URI")
    parser.add_argument("dest", metavar="DEST", nargs="?", type=Path, help="a folder to make (./NAME)")
    parser.add_argument("--all", action="store_true", help="the whole experiment: trials and study too")
    parser.add_argument("--storage", metavar="URI", help="where NAME is (./results)")
    parser.add_argument("--cluster", metavar="FILE", type=Path, help="NAME is on the head of this `ray up` cluster")
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked, terminal()), "Run the same command again to continue.")


def _run(asked: argparse.Namespace, console: Console) -> None:
    if asked.cluster:
        from lungct_tune.experiment.head_node import on_head
        from lungct_tune.experiment.transfer import check_destination

        check_destination(asked.dest or Path(asked.source), asked.all)
        with on_head(asked.cluster, asked.source, asked.storage, asked.all, console) as experiment:
            pull(experiment, asked.dest, console, everything=asked.all)
    else:
        from lungct_tune.experiment.folder import locate

        pull(locate(asked.source, asked.storage or "./results"), asked.dest, console, everything=asked.all)


def pull(experiment: Experiment, dest: Path | None, console: Console, *, everything: bool) -> None:
    """Fetches the bundle or everything, and prints its content, its accuracy and how to use it.

    Raises:
        FetchError, BundleError, StorageError: see `fetch`.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.bundle import FOLDER
    from lungct_tune.experiment.transfer import fetch

    dest = dest or Path(experiment.name)
    existed = os.path.lexists(dest)
    found = fetch(experiment, dest, console, everything=everything)
    done = f"{dest} holds this bundle already" if existed else f"pulled {experiment.name} to {dest}"
    console.print(f"{done}: {'verified' if found else 'no trial has completed yet'}")
    if found:
        from lungct_tune.reporting.console import print_bundle

        print_bundle(dest / found if everything else dest, console)
    if everything and found != FOLDER and dest.name == experiment.name:
        resume = shlex.join([*command_words("search"), "--resume", dest.name, "--storage", str(dest.absolute().parent)])
        add = "add --data DIR if it had one, as the images are now, and --study URL if it had one"
        console.print(f"to continue it here ({add}):\n  {resume}")


if __name__ == "__main__":
    sys.exit(main())
