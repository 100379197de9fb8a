"""Images from elsewhere, judged by a bundle's model as it is: the same figures as on the test split, no training.

python -m lungct_tune.evaluate --help
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from lungct_tune.cli import command_line, exit_status
from lungct_tune.evaluation.bundle_files import list_predictions
from lungct_tune.evaluation.external import OTHER, EvaluateError, read_map
from lungct_tune.evaluation.inference import load_model

EXAMPLES = """\
examples:
  python -m lungct_tune.evaluate results/NAME/best --data hospital
  python -m lungct_tune.evaluate results/NAME/best --data IQ-OTHNCCD \\
    --map "Malignant cases=cancer,Bengin cases=other,Normal cases=normal"

Classes are told by the names of their folders, as the search does, or by --map. Where a folder is mapped to cancer,
all are judged as cancer against normal. What is mapped to other is left out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    parser = command_line("evaluate", "Judge a bundle's model on other images, without training.", EXAMPLES)
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="its folder, results/NAME/best or as pulled")
    parser.add_argument("--data", metavar="DIR", required=True, help="images in folders of their classes; or a URI")
    parser.add_argument("--map", metavar="MAP", help="FOLDER=CLASS[,...]; a class, or cancer, or other")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a folder to make (./DATA-judged)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that cannot be read")
    words = sys.argv[1:] if argv is None else argv
    asked, command = parser.parse_args(words), shlex.join(["python", "-m", "lungct_tune.evaluate", *words])
    return exit_status(lambda: evaluate(asked, command, Console(highlight=False)), "Nothing was written.")


def evaluate(asked: argparse.Namespace, command: str, console: Console) -> None:
    """Verifies, reads, predicts, judges, writes report.html, metrics.json, predictions.csv, and says what was found.

    Raises:
        EvaluateError: a class is none of the bundle's, no image is left, or the output folder is there.
        BundleError, DataError, StorageError: bundle or images cannot be used.
    """
    # imported when the command line is known to be right, so that --help answers at once
    from lungct_tune.data import fetch_images, read_images
    from lungct_tune.data.seen_images import ALIKE, NEW, SAME_FILE, seen_before
    from lungct_tune.evaluation.calibration import calibrated
    from lungct_tune.evaluation.inference import uncalibrated
    from lungct_tune.evaluation.metrics import CANCER, NORMAL, cancer_or_normal, evaluate_predictions
    from lungct_tune.experiment import bundle
    from lungct_tune.experiment.bundle import REPORT, check_outside_bundles
    from lungct_tune.experiment.results import Predictions
    from lungct_tune.reporting import console as terminal
    from lungct_tune.reporting.evaluation_page import evaluation_page
    from lungct_tune.reporting.test_section import Network

    # ---- the bundle, and which classes the images are to be told by -------------------------------------
    model, config = load_model(asked.bundle)
    if not (asked.bundle / bundle.LEARNED).exists():
        raise EvaluateError(f"{asked.bundle} has no {bundle.LEARNED}: an earlier version made it; make it again")
    classes, scaling = tuple(config["classes"]), config["calibration"]
    class_map = read_map(asked.map, classes)
    together = CANCER in class_map.values() and CANCER not in classes
    judged_classes = (CANCER, NORMAL) if together else classes
    out = asked.out or Path(f"{Path(asked.data).absolute().name}-judged")
    check_outside_bundles(out, "--out")
    if out.exists():
        raise EvaluateError(f"{out} is there already; choose another --out, or move it away")

    # ---- the images: read as those were that it learned from --------------------------------------------
    root = fetch_images(asked.data)
    size = config["preprocessing"]["image_size"]
    images = read_images(root, size, class_map=class_map, skip_unreadable=asked.skip_unreadable)
    names_N = np.array(images.classes)[images.table["label"]]
    if strangers := sorted(set(images.classes) - {*judged_classes, OTHER}):
        raise EvaluateError(
            f"{root} has images of {', '.join(strangers)}, and the bundle knows {', '.join(judged_classes)}. "
            f'Say what to count them as: --map "{strangers[0]}=CLASS,…", or =other to leave them out'
        )
    judged = np.flatnonzero(names_N != OTHER)
    labels_N = np.array([judged_classes.index(name) for name in names_N[judged]])
    seen_N = seen_before(images, (asked.bundle / bundle.LEARNED).read_bytes())[judged]

    # ---- predicted and judged ---------------------------------------------------------------------------
    plain_NC = uncalibrated(model, config, images.images_NHW[judged])
    probabilities_NC = calibrated(plain_NC, scaling["temperature"]) if scaling else plain_NC
    if together:  # summed last, as whoever uses the bundle would: a sum has no temperature of its own
        plain_NC, probabilities_NC = (cancer_or_normal(said_NC, classes) for said_NC in (plain_NC, probabilities_NC))
    largest, rows = int(np.bincount(labels_N).argmax()), images.table.iloc[judged]
    figures = evaluate_predictions(
        labels_N,
        probabilities_NC,
        judged_classes,
        rows["group"].to_numpy(),
        uncalibrated_NC=plain_NC if scaling else None,
        calibration=scaling,
        references={"majority class": (judged_classes[largest], np.full(len(judged), largest))},
        overlaps_N=seen_N != NEW,
    )
    metrics = {
        "data": asked.data,
        "bundle": str(asked.bundle),
        "map": class_map,
        "left_out": {
            "other": int((names_N == OTHER).sum()),
            "unreadable": len(images.unreadable),
            "under_several_classes": sum(map(len, images.conflicts)),
        },
        "learned_from": {what: int((seen_N == what).sum()) for what in (SAME_FILE, ALIKE)},
        "test": figures,
    }
    predictions = list_predictions(rows, labels_N, probabilities_NC, judged_classes)
    page = evaluation_page(
        config["settings"]["name"],
        json.loads(bundle.as_json(metrics)),
        Predictions(list(judged_classes), predictions),
        images,
        Network(model, list(classes), config["settings"]["normalisation"]),
        command,
    )
    try:
        out.mkdir(parents=True)
        (out / bundle.PREDICTIONS).write_bytes(predictions)
        (out / bundle.METRICS).write_bytes(bundle.as_json(metrics))
        (out / REPORT).write_bytes(page)
    except OSError as error:
        raise EvaluateError(f"{out} cannot be written ({error}); choose another --out") from error
    terminal.print_judged(images, metrics, console)
    written = f"{out}/{REPORT}, {out}/{bundle.METRICS}, {out}/{bundle.PREDICTIONS}"
    console.print(f"written: {written}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
