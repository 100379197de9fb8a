"""Classifies images with a bundle's model: files, folders, URIs; with heat maps, by image or by patient.

python -m lungct_tune.predict --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.errors import UserError
from lungct_tune.stopping import stop_says

if TYPE_CHECKING:
    import pandas as pd

    from lungct_tune.data.inputs import InputImage
    from lungct_tune.evaluation.classifier import Classifier

EXAMPLES = """\
examples:
  python -m lungct_tune.predict results/NAME/best slice.png
  python -m lungct_tune.predict results/NAME/best hospital --out predictions.csv --heatmaps heatmaps
  python -m lungct_tune.predict results/NAME/best hospital --by patient
  python -m lungct_tune.predict results/NAME/best s3://BUCKET/slices --out predictions.parquet --address auto

Folders need no class folders. The bundle gives the size of the images, the window of CT values in DICOM files, the
temperature of the probabilities and the operating point. A patient is a group in the folder's groups.csv, or else a
PatientID (DICOM), of which a hash is written, or else a folder. The exit status is 0, 1 if a file could not be read, or
2 for an error. No output of this program is a diagnosis.
"""

ENDINGS = (".csv", ".json", ".parquet")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status.

    It is 0, 1 if files could not be read, 2 for an error that the user can fix, or 130 for Ctrl-C.
    """
    parser = command_line("predict", EXAMPLES)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="its folder, results/NAME/best or as pulled")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="an image, a folder, a URI, or a pattern")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"the file to write, {', '.join(ENDINGS)}")
    parser.add_argument("--heatmaps", metavar="DIR", type=Path, help="a folder to make, for a heat map of each image")
    parser.add_argument("--by", choices=["image", "patient"], default="image", help="what a row is (image)")
    parser.add_argument("--address", metavar="HOST:PORT", help="use all nodes of this Ray cluster; auto: the one here")
    asked = parser.parse_args(argv)
    stopped = "Nothing was written."
    if asked.heatmaps:
        stopped = (
            f"Only heat maps may have been written, to {asked.heatmaps}; remove them, or choose another --heatmaps."
        )
    return exit_status(lambda: predict(asked, terminal()), stopped)


def predict(asked: argparse.Namespace, console: Console) -> int:
    """Reads the bundle, finds and classifies the images, and writes or prints the rows; returns the exit status.

    Raises:
        BundleError, DataError, ClassifyError, ClusterError: the bundle, the inputs or the cluster cannot be used.
        UserError: an output cannot be written.
    """
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.data.inputs import find_inputs
    from lungct_tune.experiment.bundle import verify

    _check_outputs(asked)
    verify(asked.bundle)  # before torch is imported, which takes seconds
    images, left_aside = find_inputs(asked.inputs)

    import pandas as pd

    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.evaluation.prediction import by_patient
    from lungct_tune.reporting.prediction import print_predictions, write_table

    classifier = Classifier.load(asked.bundle)
    files = [image for image in images if not image.fault]
    rows = pd.concat(_with_progress(_classify(classifier, files, asked), len(files)))
    rows = rows.set_index("path").reindex([image.source for image in images]).reset_index()  # in the inputs' order
    rows["unreadable"] = [image.fault or why for image, why in zip(images, rows["unreadable"], strict=True)]
    rows = rows.astype({"unlike_training": "boolean"})  # what Ray Data makes of it depends on the missing values
    groups = [image.group for image in images]
    patients = by_patient(rows, groups, classifier.classes, classifier.threshold) if asked.by == "patient" else None
    table = rows if patients is None else patients
    is_read = rows["unreadable"] == ""
    if asked.out:
        write_table(table, asked.out)
    written = [f"written: {path}" for path in (asked.out, asked.heatmaps if is_read.any() else None) if path]
    with stop_says("\n".join(written)):
        print_predictions(classifier, rows, patients, left_aside, console)
        for line in written:
            console.print(line)
    return int(not is_read.all())


def _check_outputs(asked: argparse.Namespace) -> None:
    from lungct_tune.reporting.output_file import check_output

    if asked.heatmaps and asked.address:
        raise UserError("--heatmaps are drawn on this machine; leave --address out, or draw them for fewer images")
    if asked.out is None:
        return
    if asked.out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {asked.out}: its name must end in one of {', '.join(ENDINGS)}")
    check_output(asked.out, "--out")


def _classify(
    classifier: Classifier, images: Sequence[InputImage], asked: argparse.Namespace
) -> Iterator[pd.DataFrame]:
    """Yields the rows of all images, some at a time."""
    from lungct_tune.evaluation.prediction import classify_in_parts
    from lungct_tune.reporting.heat_maps import HeatMapFolder

    sources = [image.source for image in images]
    if not sources:
        yield classifier.classify_files([])
        return
    if not asked.address:
        heat_maps = HeatMapFolder(asked.heatmaps, classifier, sources) if asked.heatmaps else None
        yield from classify_in_parts(classifier, sources, heat_maps)
        return

    from lungct_tune.tuning.batch_inference import map_on_cluster

    yield from map_on_cluster(asked.address, classifier.classify_files, sources)


def _with_progress(parts: Iterator[pd.DataFrame], total: int) -> list[pd.DataFrame]:
    """Collects all rows, with a bar if stderr is a terminal."""
    from rich.progress import Progress

    collected = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Classifying images", total=total)
        for part in parts:
            collected.append(part)
            progress.advance(task, len(part))
    return collected


if __name__ == "__main__":
    sys.exit(main())
