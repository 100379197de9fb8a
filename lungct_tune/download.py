"""Fetches the public CT images from Kaggle; needs the extra `kaggle`.

python -m lungct_tune.download [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

DATASET = "mohamedhanyyy/chest-ctscan-images"


class DownloadError(RuntimeError):
    """The images could not be fetched: the message says why and what else to do."""


def download(folder: Path) -> Path:
    """Downloads and unpacks the data set through kagglehub; a complete earlier download is used again.

    Raises:
        DownloadError: kagglehub is not installed, Kaggle cannot be reached or refuses.
    """
    try:
        import kagglehub
    except ImportError as error:
        raise DownloadError("kagglehub is not installed (the extra `kaggle`): pip install kagglehub") from error
    try:
        return Path(kagglehub.dataset_download(DATASET, output_dir=str(folder)))
    except Exception as error:  # kagglehub lets every error of requests, sockets and zip files through
        raise DownloadError(
            f"{DATASET} cannot be downloaded from Kaggle ({type(error).__name__}: {error}).\n"
            "Check the network; or download the zip file in a browser from "
            f"https://www.kaggle.com/datasets/{DATASET}, unpack it, and give its folder to --data"
        ) from error


def main(argv: list[str]) -> int:
    """Runs the command line; returns its exit status."""
    folder = Path(argv[0] if argv else "chest-ctscan")
    try:
        found = download(folder)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the images are in {found}; now: python -m lungct_tune.search --data {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
