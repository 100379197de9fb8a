"""Evaluates a bundle's model on other images, without training: the same figures as on the test split.

python -m lungct_tune.evaluate --help
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.stopping import stop_says

EXAMPLES = """\
examples:
  python -m lungct_tune.evaluate results/NAME/best --data hospital
  python -m lungct_tune.evaluate results/NAME/best --data IQ-OTHNCCD \\
    --map "Malignant cases=cancer,Bengin cases=other,Normal cases=normal"

The class of an image is the name of its folder, as for the search, or the class that --map gives to the folder, or
that of its line in the --table. The window of CT values in DICOM files is the bundle's. If
--map has the class cancer, the model is evaluated on cancer against normal. Folders mapped to other are left out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    parser = command_line("evaluate", EXAMPLES)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="its folder, results/NAME/best or as pulled")
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder or URI of images, in folders by class")
    parser.add_argument(
        "--table", metavar="FILE", type=Path, help="a CSV of path (or SeriesInstanceUID), class and group"
    )
    parser.add_argument("--map", metavar="MAP", help="FOLDER=CLASS[,...]; CLASS may be cancer or other")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a folder to make (./DATA-judged)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that cannot be read")
    words = sys.argv[1:] if argv is None else argv
    asked, command = parser.parse_args(words), shlex.join(["python", "-m", "lungct_tune.evaluate", *words])
    return exit_status(lambda: evaluate(asked, command, terminal()), "Nothing was written.")


def evaluate(asked: argparse.Namespace, command: str, console: Console) -> None:
    """Reads the bundle and the images, predicts, and writes report.html, metrics.json and predictions.csv.

    Raises:
        EvaluateError: a class is not one of the bundle's, or no image is left.
        UserError: the output folder exists, is in a bundle, or cannot be written.
        BundleError, DataError, StorageError: the bundle or the images cannot be used.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.bundle import verify

    verify(asked.bundle)  # before torch is imported, which takes seconds

    from lungct_tune.data import fetch_images, read_images
    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.evaluation.external import evaluate_images, read_map
    from lungct_tune.experiment.bundle import METRICS, PREDICTIONS, REPORT
    from lungct_tune.experiment.metrics import metrics_json
    from lungct_tune.reporting.console import print_judged
    from lungct_tune.reporting.evaluation_page import evaluation_page
    from lungct_tune.reporting.format import place_name
    from lungct_tune.reporting.output_file import check_output, written_whole
    from lungct_tune.reporting.test_section import Network

    bundle = Classifier.load(asked.bundle)
    settings = bundle.config.settings
    class_map = read_map(asked.map, bundle.classes)
    out = asked.out or Path(f"{place_name(asked.data)}-judged")
    check_output(out, "--out", is_folder=True)

    folder = fetch_images(asked.data)
    images = read_images(
        folder,
        bundle.image_size,
        class_map=class_map,
        skip_unreadable=asked.skip_unreadable,
        table=asked.table,
        window=bundle.window,
        fewest_classes=1,  # the sensitivity for one class is worth knowing
    )
    metrics, predictions = evaluate_images(bundle, images, class_map, asked.data)
    network = Network(bundle.model, bundle.classes, settings.normalisation)
    phantoms = settings.data is None
    page = evaluation_page(settings.name, metrics, predictions, images, network, command, phantoms=phantoms)

    files = {REPORT: page, METRICS: metrics_json(metrics), PREDICTIONS: predictions.as_csv()}
    with written_whole(out, "--out") as new:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
    written = f"written: {', '.join(f'{out}/{name}' for name in files)}"
    with stop_says(written):
        print_judged(images, metrics, console, phantoms=phantoms)
        console.print(written)


if __name__ == "__main__":
    sys.exit(main())
