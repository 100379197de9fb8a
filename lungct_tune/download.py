"""Fetches the public CT images from Kaggle; needs the extra `kaggle`.

python -m lungct_tune.download --help
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lungct_tune.cli import command_line, command_words, exit_status
from lungct_tune.errors import UserError

DATASET = "mohamedhanyyy/chest-ctscan-images"

EXAMPLES = """\
examples:
  python -m lungct_tune.download                to ./chest-ctscan
  python -m lungct_tune.download data/lungs     to another folder
"""


def download(folder: Path) -> Path:
    """Downloads and unpacks the data set with kagglehub; an earlier complete download is used again.

    Raises:
        UserError: kagglehub is not installed, or Kaggle cannot be reached or refuses the download.
    """
    try:
        import kagglehub
    except ImportError as error:
        raise UserError("kagglehub is not installed (the extra `kaggle`): pip install kagglehub") from error
    try:
        return Path(kagglehub.dataset_download(DATASET, output_dir=str(folder)))
    except Exception as error:  # kagglehub raises every error of requests, sockets and zip files
        raise UserError(
            f"{DATASET} cannot be downloaded from Kaggle ({type(error).__name__}: {error}).\n"
            "Check the network. Or download the zip file in a browser from "
            f"https://www.kaggle.com/datasets/{DATASET}, unpack it, and give its folder to --data"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("download", EXAMPLES)
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=Path("chest-ctscan"),
        help="where to put the images (./chest-ctscan)",
    )
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked.folder))


def _run(folder: Path) -> None:
    found = download(folder)
    next_command = shlex.join([*command_words("search"), "--data", str(found)])
    print(f"The images are in {found}. Next: {next_command}")


if __name__ == "__main__":
    sys.exit(main())
