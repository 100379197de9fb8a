"""Removes what a finished search does not need any more, after saying what and how much.

python -m lungct_tune.clean --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.errors import UserError, number_of

EXAMPLES = """\
examples:
  python -m lungct_tune.clean 2026-11-23-054807-phantoms         in ./results
  python -m lungct_tune.clean s3://bucket/lungct_tune/NAME
  python -m lungct_tune.clean NAME --unfinished                  also if the search has not ended

The bundle, the study, the settings, TensorBoard's events and all files that no search writes stay. So pull, report and
replay still work.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("clean", EXAMPLES)
    parser.add_argument("source", metavar="EXPERIMENT", help="an experiment's NAME, path or URI")
    parser.add_argument("--storage", metavar="URI", default="./results", help="where NAME is (./results)")
    parser.add_argument(
        "--unfinished", action="store_true", help="also a search that has not ended, which loses its saved states"
    )
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked, terminal()), "Run the same command again to continue.")


class NotCleaned(UserError):
    """Nothing was removed. The message says why and what to do."""


def _run(asked: argparse.Namespace, console: Console) -> None:
    """Prints what can be removed, and removes it.

    Raises:
        NotCleaned: there is no such experiment, or it has not ended.
        StorageError: the storage refuses, or a search runs in it.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.bundle import FOLDER, find_bundle
    from lungct_tune.experiment.disk_use import as_size, not_needed, remove, sizes_by_kind
    from lungct_tune.experiment.folder import locate
    from lungct_tune.experiment.lock import exclusive_lock
    from lungct_tune.experiment.plan import no_such_search

    experiment = locate(asked.source, asked.storage)
    if not experiment.exists("settings.yaml"):
        raise NotCleaned(no_such_search(experiment))
    with exclusive_lock(experiment, console.print):
        ended = find_bundle(experiment) == FOLDER
        if not asked.unfinished and not ended:
            raise NotCleaned(
                f"{experiment.uri} has not ended, so nothing was removed. With --unfinished its states and weights are "
                "removed: it can be resumed then, but the trials and trainings that had not ended begin again"
            )
        files = not_needed(experiment, ended=ended)
        kept = sum(experiment.files().values()) - sum(files.values())
        for what, size in sizes_by_kind(files).items():
            console.print(f"{as_size(size):>8}  {what}")
        remove(experiment, files)
    done = f"removed {number_of(len(files), 'file')}, {as_size(sum(files.values()))}" if files else "nothing to remove"
    console.print(f"{experiment.uri}: {done}; {as_size(kept)} are left")


if __name__ == "__main__":
    sys.exit(main())
