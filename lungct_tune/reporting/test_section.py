"""The report's section on the test results: figures, curves and every misclassified image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungct_tune.config.window import parse_window
from lungct_tune.data import DataError, ImageSet, fetch_images, make_phantoms, read_images
from lungct_tune.data.cache import default_cache
from lungct_tune.experiment.metrics import (
    MAJORITY,
    PUBLISHED,
    SHORTCUT,
    CalibrationErrors,
    CalibrationMetrics,
    Figure,
    Reference,
    TestMetrics,
)
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.experiment.results import SearchResults
from lungct_tune.models.ensemble import Model
from lungct_tune.reporting import test_charts
from lungct_tune.reporting.cancer_section import cancer_section
from lungct_tune.reporting.format import percent, points
from lungct_tune.reporting.mistakes_section import mistakes_section
from lungct_tune.training.objective import OBJECTIVE_NAME


@dataclass(frozen=True)
class Pictures:
    """The images that a report can show, or why there are none."""

    images: ImageSet | None = None
    missing: str = ""


@dataclass(frozen=True)
class Network:
    """A bundle's model, for the Grad-CAM maps."""

    model: Model
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
        "tiles": _tiles(test),
        "confusion": _confusion(test.confusion_matrix, classes),
        "test_charts": {
            "roc": test_charts.roc(labels_N, probabilities_NC, test.per_class),
            "precision_recall": test_charts.precision_recall(labels_N, probabilities_NC, test.per_class),
            "reliability": test_charts.reliability(curves),
        },
        "calibration": about_calibration(test.calibration),
        "references": references(test),
        "difference": difference(test),
        "cancer": cancer_section(test, predictions),
        "mistakes": mistakes_section(predictions, pictures, network, seed),
    }


def _tiles(test: TestMetrics) -> list[tuple[str, Figure]]:
    """The main figures, each with its title; those without group overlap come first."""
    clean, overall = test.without_overlap, ""
    tiles: list[tuple[str, Figure]] = []
    if clean is not None:
        if clean.balanced_accuracy.value is not None:
            tiles.append((f"balanced accuracy, {clean.n} images without group overlap", clean.balanced_accuracy))
        tiles.append((f"accuracy, {clean.n} images without group overlap", clean.accuracy))
        overall = f", all {test.n} images"
    return [
        *tiles,
        (f"balanced accuracy{overall}", test.balanced_accuracy),
        (f"accuracy{overall}", test.accuracy),
        (f"macro F1{overall}", test.macro_f1),
    ]


def compared_accuracies(test: TestMetrics) -> list[tuple[str, float, tuple[float, float] | None, bool]]:
    """Balanced accuracies on the same images, those of the model first: without group overlap, then on all images.

    Returns:
        Name, value, interval, whether it is the model's.
    """
    rows, everywhere = [], "this model"
    if (clean := test.without_overlap) and clean.balanced_accuracy.value is not None:
        rows.append((f"this model, {clean.n} images without group overlap", clean.balanced_accuracy, True))
        everywhere = f"this model, all {test.n} images"
    rows.append((everywhere, test.balanced_accuracy, True))
    rows += [(name, reference.balanced_accuracy, False) for name, reference in references(test)]
    return [(name, f.value, f.ci95, is_model) for name, f, is_model in rows if f.value is not None]


def references(test: TestMetrics) -> list[tuple[str, Reference]]:
    """Other predictions for the same images, each with its title in the report."""
    titles = {PUBLISHED: "published configuration", SHORTCUT: "shortcut: {}", MAJORITY: "always {}"}
    return [
        (title.format(reference.name), reference)
        for of_kind, title in titles.items()
        for kind, reference in test.references.items()
        if kind.partition(":")[0] == of_kind
    ]


def about_calibration(calibration: CalibrationMetrics) -> str:
    """The calibration errors and the temperature, as text."""

    def text(errors: CalibrationErrors) -> str:
        return f"expected calibration error {percent(errors.ece.value)}, Brier score (0 to 2) {errors.brier.value:.3f}"

    if calibration.after is None or calibration.fitted_on is None:
        return f"Without temperature scaling: {text(calibration.before)}."
    return (
        f"Before temperature scaling: {text(calibration.before)}. After it: {text(calibration.after)}. The temperature "
        f"is {calibration.temperature:.2f}, fitted on {calibration.fitted_on.images} images "
        f"({calibration.fitted_on.what})."
    )


def difference(test: TestMetrics) -> str:
    """The paired differences to the published configuration, as text; "" if that was not retrained."""
    published = test.references.get(PUBLISHED)
    if published is None or published.difference.value is None:
        return ""
    balanced = f"{points(published.balanced_difference, OBJECTIVE_NAME)}; " if published.balanced_difference else ""
    return (
        "The published configuration was retrained in the same way. This model minus the published configuration, "
        f"paired by image: {balanced}{points(published.difference, 'accuracy')}. McNemar's test, which assumes "
        f"independent images: p = {published.mcnemar_p:.2g}."
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
            check_map=False,
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
