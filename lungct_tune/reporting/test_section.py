"""The report's section on the test results: figures, curves and every misclassified image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lungct_tune.config.window import parse_window
from lungct_tune.data import DataError, ImageSet, fetch_images, make_phantoms, read_images
from lungct_tune.data.cache import default_cache
from lungct_tune.experiment.metrics import CalibrationErrors, CalibrationMetrics, Reference, TestMetrics
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.experiment.results import SearchResults
from lungct_tune.models.gradcam import grad_cam
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.reporting import test_charts
from lungct_tune.reporting.html import data_uri

MOST_SHOWN = 300
"""The most misclassified images that are shown; each takes 25 KB."""

RIGHT_SHOWN = 2
"""Correctly classified images of each class that are shown."""

PIXELS = 224
"""Width of a shown image; smaller ones are shown as they are."""

MAP_RED = (226, 46, 26)


@dataclass(frozen=True)
class Pictures:
    """The images that a report can show, or why there are none."""

    images: ImageSet | None = None
    missing: str = ""


@dataclass(frozen=True)
class Network:
    """A bundle's model, for the Grad-CAM maps."""

    model: TruncatedResNet50
    classes: tuple[str, ...]
    normalisation: str


def test_section(
    test: TestMetrics, predictions: Predictions, pictures: Pictures, network: Network, seed: int, on: str
) -> dict[str, Any]:
    """The values for judged.html: figures, curves, and every misclassified image.

    Args:
        network: for the Grad-CAM maps. There are none if its classes are not those of the predictions.
        seed: for the sample of correctly classified images.
        on: a sentence that says which images these are.
    """
    curves = {"before temperature scaling": test.calibration.reliability.before}
    if test.calibration.reliability.after:
        curves["after temperature scaling"] = test.calibration.reliability.after
    labels_N, probabilities_NC, classes = predictions.labels_N, predictions.probabilities_NC, predictions.classes
    return {
        "test": test,
        "classes": classes,
        "judged_on": on,
        "tiles": [
            ("accuracy", test.accuracy),
            ("balanced accuracy", test.balanced_accuracy),
            ("macro F1", test.macro_f1),
            *([("accuracy without group overlap", test.without_overlap.accuracy)] if test.without_overlap else []),
        ],
        "confusion": _confusion(test.confusion_matrix, classes),
        "test_charts": {
            "roc": test_charts.roc(labels_N, probabilities_NC, classes),
            "precision_recall": test_charts.precision_recall(labels_N, probabilities_NC, classes),
            "reliability": test_charts.reliability(curves),
        },
        "calibration": about_calibration(test.calibration),
        "references": references(test),
        "difference": difference(test),
        "mistakes": _mistakes(predictions, pictures, network, seed),
    }


def compared_accuracies(test: TestMetrics) -> list[tuple[str, float, tuple[float, float] | None, bool]]:
    """Accuracies on the same images, that of the model first: name, value, interval, whether it is the model's."""
    rows = [("this model", test.accuracy, True)]
    if clean := test.without_overlap:
        rows.append((f"this model, {clean.n} images without group overlap", clean.accuracy, True))
    rows += [(name, reference.accuracy, False) for name, reference in references(test)]
    return [(name, f.value, f.ci95, is_model) for name, f, is_model in rows if f.value is not None]


def references(test: TestMetrics) -> list[tuple[str, Reference]]:
    """Other predictions for the same images, each with its title in the report."""
    titles = {"published": "published configuration", "shortcut": "shortcut: {}", "majority class": "always {}"}
    by_kind = test.references
    return [(title.format(by_kind[kind].name), by_kind[kind]) for kind, title in titles.items() if kind in by_kind]


def about_calibration(calibration: CalibrationMetrics) -> str:
    """The calibration errors and the temperature, as text."""

    def text(errors: CalibrationErrors) -> str:
        return f"expected calibration error {errors.ece.value:.3f}, Brier score {errors.brier.value:.3f}"

    if calibration.after is None or calibration.fitted_on is None:
        return f"Without temperature scaling: {text(calibration.before)}."
    return (
        f"Before temperature scaling: {text(calibration.before)}. After it: {text(calibration.after)}. The temperature "
        f"is {calibration.temperature:.2f}, fitted on {calibration.fitted_on.images} images "
        f"({calibration.fitted_on.what})."
    )


def difference(test: TestMetrics) -> str:
    """The paired difference to the published configuration, as text; "" if that was not retrained."""
    published = test.references.get("published")
    if published is None or published.difference.value is None:
        return ""
    f = published.difference
    between = f" (95 % interval {100 * f.ci95[0]:+.1f} to {100 * f.ci95[1]:+.1f})" if f.ci95 else ""
    return (
        "The published configuration was retrained in the same way. Accuracy of this model minus accuracy of the "
        f"published configuration, paired by image: {100 * published.difference.value:+.1f} points{between}. McNemar's "
        f"test, which assumes independent images: p = {published.mcnemar_p:.2g}."
    )


def find_pictures(found: SearchResults, data: str | Path | None, is_local: bool, table: Path | None = None) -> Pictures:
    """Reads the images of a search, from `data` and `table` or from the search's own paths; if it cannot, says why.

    Args:
        is_local: whether the search is in a folder. Paths are not taken from a remote storage, see `confirm_paths`.
    """
    settings = found.settings
    if settings["data"] and not data and (not is_local or "://" in settings["data"]):
        return Pictures(
            missing="addresses, and paths on a remote storage, are not taken from an experiment, since others may "
            f"write to it; give the folder of the images with --data DIR (settings.yaml names {settings['data']})"
        )
    if settings["table"] and not table and not is_local:
        return Pictures(missing=f"give the search's table with --table FILE (settings.yaml names {settings['table']})")
    root = data or settings["data"] or make_phantoms(default_cache(), settings["seed"])
    try:
        images = read_images(
            fetch_images(root),
            settings["image_size"],
            class_map=settings["class_map"],
            skip_unreadable=settings["skip_unreadable"],
            table=table or (Path(settings["table"]) if settings["table"] else None),
            window=parse_window(settings["window"]) if settings["window"] else None,
        )
    except DataError as error:
        return Pictures(missing=f"{error}\nGive the folder of the images with --data DIR")
    if images.fingerprint != settings["fingerprint"]:
        return Pictures(missing=f"the images in {root} are not those of the search; give their folder with --data DIR")
    return Pictures(images)


def _confusion(table: list[list[int]], classes: tuple[str, ...]) -> list[tuple[str, list[tuple[int, float, str]]]]:
    """For each class a row of cells: number of images, share of the row, colour."""
    return [
        (
            name,
            [(n, n / max(sum(row), 1), "winner" if true == predicted else "bad") for predicted, n in enumerate(row)],
        )
        for true, (name, row) in enumerate(zip(classes, table, strict=True))
    ]


def _mistakes(predictions: Predictions, pictures: Pictures, network: Network, seed: int) -> dict[str, Any]:
    classes, labels_N, predicted_N = predictions.classes, predictions.labels_N, predictions.predicted_N
    confidence_N = predictions.probabilities_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    wrong = wrong[np.argsort(-confidence_N[wrong], kind="stable")]
    random = np.random.default_rng(seed)
    right_by_class = [np.flatnonzero((labels_N == c) & (predicted_N == c)) for c in range(len(classes))]
    right = [row for rows in right_by_class for row in random.permutation(rows)[:RIGHT_SHOWN]]
    shown = np.array([*wrong[:MOST_SHOWN], *right], dtype=int)
    cases = [
        {
            "id": number,
            "path": predictions.paths_N[row],
            "truth": classes[labels_N[row]],
            "predicted": classes[predicted_N[row]],
            "probabilities": list(zip(classes, predictions.probabilities_NC[row], strict=True)),
        }
        for number, row in enumerate(shown)
    ]
    again = _add_pictures(cases, shown, predictions, pictures.images, network) if pictures.images and cases else ""
    few = f" Only the first {MOST_SHOWN} are shown." if len(wrong) > MOST_SHOWN else ""
    return {
        "summary": f"{len(wrong)} of {len(labels_N)} images are misclassified. The most confident come first." + few,
        "no_pictures": f"Without pictures: {pictures.missing}" if pictures.missing else "",
        "no_maps": "" if classes == network.classes else "No maps: the network's own classes are finer than these.",
        "again": again,
        "wrong": cases[: len(shown) - len(right)],
        "right": cases[len(shown) - len(right) :],
    }


def _add_pictures(
    cases: list[dict[str, Any]], rows: np.ndarray, predictions: Predictions, images: ImageSet, network: Network
) -> str:
    """Adds picture and maps to each case; says for how many the model predicts the same class again."""
    positions = pd.Index(images.table["path"]).get_indexer(predictions.paths_N[rows])
    images_NHW = images.images_NHW[positions]
    for case, image_HW in zip(cases, images_NHW, strict=True):
        case["picture"], case["maps"] = _picture(image_HW), []
    if predictions.classes != network.classes:
        return ""
    predicted_N, labels_N = predictions.predicted_N[rows], predictions.labels_N[rows]
    classes_N2 = np.stack([predicted_N, labels_N], axis=1)
    maps_N2hw, again_NC = grad_cam(network.model, images_NHW, classes_N2, network.normalisation)
    for case, maps_2hw in zip(cases, maps_N2hw, strict=True):
        case["maps"] = [_map(map_hw) for map_hw in maps_2hw[: 1 + (case["predicted"] != case["truth"])]]
    same = int((again_NC.argmax(axis=1) == predicted_N).sum())
    return f"Run again for these pictures, the model predicts the same class for {same} of {len(rows)}."


def _picture(grey_HW: np.ndarray) -> str:
    image = Image.fromarray(grey_HW)
    image.thumbnail((PIXELS, PIXELS))
    return data_uri(image, quality=70)


def _map(map_hw: np.ndarray) -> str:
    """Encodes a map: red where it is high, transparent where it is low; "" for a map of zeros."""
    if not map_hw.any():
        return ""
    alpha = Image.fromarray(np.round(170 * map_hw).astype(np.uint8)).resize((112, 112), Image.Resampling.BICUBIC)
    image = Image.new("RGBA", alpha.size, MAP_RED)
    image.putalpha(alpha)
    return data_uri(image, quality=50)
