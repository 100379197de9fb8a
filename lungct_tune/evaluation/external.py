"""Evaluates a bundle's model on external images without training. The figures are those of the test split."""

from __future__ import annotations

import numpy as np

from lungct_tune.config.settings import pairs
from lungct_tune.data import ImageSet
from lungct_tune.data.seen_images import ALIKE, NEW, SAME_FILE
from lungct_tune.errors import UserError
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.evaluation.metrics import (
    CANCER,
    CANCERS,
    NORMAL,
    are_cancer_and_normal,
    cancer_probability,
    evaluate_predictions,
)
from lungct_tune.experiment.bundle import LEARNED
from lungct_tune.experiment.metrics import EvaluationMetrics, LearnedFrom, LeftOut
from lungct_tune.experiment.predictions import Predictions

OTHER = "other"
"""The class of folders whose images are in none of the bundle's classes, unless it is one of them."""


class EvaluateError(UserError):
    """These images cannot be evaluated with this bundle. The message says why and what to do."""


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
        given = {name: CANCER for name in classes if name in CANCERS} | given
        given = {folder: CANCER if name in CANCERS else name for folder, name in given.items()}
    return given


def evaluate_images(
    bundle: Classifier, images: ImageSet, class_map: dict[str, str], data: str
) -> tuple[EvaluationMetrics, Predictions]:
    """Classifies the images with the bundle's model, without those that are mapped to `OTHER`.

    Args:
        bundle: the bundle.
        images: read with the bundle's `image_size` and the class map.
        class_map: of `read_map`; if it has "cancer", the classes are cancer and normal.
        data: where the images are, for metrics.json.

    Returns:
        The figures and the predictions.

    Raises:
        EvaluateError: some images are of classes that the bundle does not have, all are mapped to `OTHER`, or the
            bundle is of an earlier version that did not list its training images.
    """
    if bundle.learned is None:
        raise EvaluateError(
            f"{bundle.folder} has no {LEARNED}, because an earlier version made it. Run its search again"
        )
    two_classes = CANCER in class_map.values() and CANCER not in bundle.classes
    classes = (CANCER, NORMAL) if two_classes else bundle.classes
    names_N = _names(images, classes)
    is_other_N = (names_N == OTHER) & (OTHER not in classes)  # it may be the name of a class of the model
    evaluated = np.flatnonzero(~is_other_N)
    if not len(evaluated):
        raise EvaluateError(f"all {len(names_N)} images in {images.root} are mapped to {OTHER}, so none is left")
    labels_N = np.array([classes.index(name) for name in names_N[evaluated]])
    rows = images.table.iloc[evaluated]
    classified = bundle.classify(images.images_NHW[evaluated], rows["digest"].to_numpy())
    uncalibrated_NC, probabilities_NC = classified.uncalibrated_NC, classified.probabilities_NC
    seen_N, scaling, point = classified.seen_N, bundle.scaling, bundle.config.operating_point
    assert seen_N is not None  # the bundle lists its training images
    if two_classes:  # summed after the scaling, because the temperature is for the single classes
        normal = bundle.classes.index(NORMAL)
        uncalibrated_NC, probabilities_NC = (
            np.stack([cancer_probability(p_NC, bundle.classes), p_NC[:, normal]], axis=1)
            for p_NC in (uncalibrated_NC, probabilities_NC)
        )

    # a rule that always names the only class is right on all of its images, and says nothing of the model
    largest = int(np.bincount(labels_N).argmax())
    always = {"majority class": (classes[largest], np.full(len(evaluated), largest))} if np.ptp(labels_N) else {}
    groups_N = rows["group"].to_numpy()
    test = evaluate_predictions(
        labels_N,
        probabilities_NC,
        classes,
        groups_N,
        uncalibrated_NC=uncalibrated_NC if scaling else None,
        scaling=scaling,
        references=always,
        overlap_N=np.isin(groups_N, groups_N[seen_N != NEW]),
        threshold=bundle.threshold,
        at_95_specificity=point.at_95_specificity if point else None,
    )
    metrics = EvaluationMetrics(
        data=data,
        bundle=str(bundle.folder),
        class_map=class_map,
        left_out=LeftOut(
            other=int(is_other_N.sum()),
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
