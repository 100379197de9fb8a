"""Evaluates a bundle's model on external images without training. The figures are those of the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungct_tune.config.settings import pairs
from lungct_tune.data import ImageSet
from lungct_tune.data.seen_images import ALIKE, NEW, SAME_FILE, read_learned, seen_before
from lungct_tune.errors import UserError
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.inference import load_model, uncalibrated
from lungct_tune.evaluation.metrics import (
    CANCER,
    CANCERS,
    NORMAL,
    are_cancer_and_normal,
    cancer_or_normal,
    evaluate_predictions,
)
from lungct_tune.experiment.bundle import LEARNED
from lungct_tune.experiment.form import written_by_a_search
from lungct_tune.experiment.metrics import EvaluationMetrics, FittedOn, LearnedFrom, LeftOut, TemperatureScaling
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.models.truncated_resnet import TruncatedResNet50

OTHER = "other"
"""The class of folders whose images are in none of the bundle's classes."""


class EvaluateError(UserError):
    """These images cannot be evaluated with this bundle. The message says why and what to do."""


@dataclass(frozen=True, eq=False)
class LoadedBundle:
    """A bundle whose model is evaluated on external images."""

    folder: Path
    model: TruncatedResNet50
    config: dict[str, Any]
    """config.json."""
    learned: bytes
    """The list of the model's training images."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def scaling(self) -> TemperatureScaling | None:
        kept = self.config["calibration"]
        return TemperatureScaling(kept["temperature"], FittedOn(**kept["fitted_on"])) if kept else None


def load_bundle(folder: Path) -> LoadedBundle:
    """Verifies and reads a bundle.

    Raises:
        BundleError: it is incomplete or altered.
        EvaluateError: it is of an older version, which did not list the training images.
    """
    model, config = load_model(folder)
    if not (folder / LEARNED).exists():
        raise EvaluateError(f"{folder} has no {LEARNED}, because an earlier version made it. Run its search again")
    learned = (folder / LEARNED).read_bytes()
    with written_by_a_search(str(folder / LEARNED)):
        read_learned(learned)
    return LoadedBundle(folder, model, config, learned)


def read_map(text: str | None, classes: tuple[str, ...]) -> dict[str, str]:
    """Reads --map: the class of the images, by folder. If it has the class "cancer", all cancers count as "cancer".

    Args:
        text: FOLDER=CLASS[,FOLDER=CLASS...].
        classes: the bundle's.

    Raises:
        EvaluateError: it is no map, or it has a class that is not the bundle's, cancer or other.
    """
    try:
        given: dict[str, str] = pairs(text or {})
    except ValueError as error:
        raise EvaluateError(f"--map {text!r}: {error}") from error
    allowed = dict.fromkeys((*classes, *([CANCER] if are_cancer_and_normal(classes) else []), OTHER))
    if wrong := [f"{folder}={name}" for folder, name in given.items() if name not in allowed]:
        raise EvaluateError(f"--map: {', '.join(wrong)}: this bundle's images can be {', '.join(allowed)}")
    if CANCER in given.values() and CANCER not in classes:
        given = dict.fromkeys(set(CANCERS) & set(classes), CANCER) | given
        given = {folder: CANCER if name in CANCERS else name for folder, name in given.items()}
    return given


def evaluate_images(
    bundle: LoadedBundle, images: ImageSet, class_map: dict[str, str], data: str
) -> tuple[EvaluationMetrics, Predictions]:
    """Predicts the images that are not `OTHER` with the bundle's model; returns the figures and the predictions.

    Args:
        images: read with the bundle's `image_size` and the class map.
        class_map: of `read_map`; if it has "cancer", the classes are cancer and normal.
        data: where the images are, for metrics.json.

    Raises:
        EvaluateError: some images are of classes that the bundle does not have.
    """
    two_classes = CANCER in class_map.values() and CANCER not in bundle.classes
    classes = (CANCER, NORMAL) if two_classes else bundle.classes
    names_N = _names(images, classes)
    evaluated = np.flatnonzero(names_N != OTHER)
    labels_N = np.array([classes.index(name) for name in names_N[evaluated]])
    seen_N = seen_before(images, bundle.learned)[evaluated]

    scaling = bundle.scaling
    uncalibrated_NC = uncalibrated(bundle.model, bundle.config, images.images_NHW[evaluated])
    probabilities_NC = calibrated(uncalibrated_NC, scaling.temperature) if scaling else uncalibrated_NC
    if two_classes:  # summed after the scaling, because the temperature is for the single classes
        uncalibrated_NC = cancer_or_normal(uncalibrated_NC, bundle.classes)
        probabilities_NC = cancer_or_normal(probabilities_NC, bundle.classes)

    rows, largest = images.table.iloc[evaluated], int(np.bincount(labels_N).argmax())
    groups_N = rows["group"].to_numpy()
    test = evaluate_predictions(
        labels_N,
        probabilities_NC,
        classes,
        groups_N,
        uncalibrated_NC=uncalibrated_NC if scaling else None,
        scaling=scaling,
        references={"majority class": (classes[largest], np.full(len(evaluated), largest))},
        overlap_N=seen_N != NEW,
    )
    metrics = EvaluationMetrics(
        data=data,
        bundle=str(bundle.folder),
        class_map=class_map,
        left_out=LeftOut(
            other=int((names_N == OTHER).sum()),
            unreadable=len(images.unreadable),
            under_several_classes=sum(map(len, images.conflicts)),
        ),
        learned_from=LearnedFrom(int((seen_N == SAME_FILE).sum()), int((seen_N == ALIKE).sum())),
        test=test,
    )
    return metrics, Predictions(classes, rows["path"].to_numpy(), labels_N, probabilities_NC, groups_N)


def _names(images: ImageSet, classes: tuple[str, ...]) -> np.ndarray:
    """The name of each image's class: one of these, or `OTHER`."""
    if unknown := sorted(set(images.classes) - {*classes, OTHER}):
        raise EvaluateError(
            f"{images.root} has images of {', '.join(unknown)}, and the bundle knows {', '.join(classes)}. "
            f'Give their classes with --map "{unknown[0]}=CLASS,…", or =other to leave them out'
        )
    return np.array(images.classes)[images.table["label"]]
