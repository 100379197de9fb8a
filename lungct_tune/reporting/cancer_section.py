"""The report's part on cancer against normal: the rule, both rates, ROC, calibration and net benefit."""

from __future__ import annotations

from typing import Any

from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.calibration import CalibrationLine, calibration_line
from lungct_tune.evaluation.metrics import NORMAL, cancer_probability
from lungct_tune.experiment.metrics import HALF, CancerMetrics, TestMetrics
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.reporting import test_charts
from lungct_tune.reporting.format import in_words, percent


def cancer_section(test: TestMetrics, predictions: Predictions) -> dict[str, Any] | None:
    """The values for the part of judged.html on cancer against normal; None where the classes are others."""
    cancer, classes = test.cancer_vs_normal, predictions.classes
    if cancer is None:
        return None
    is_N = predictions.labels_N != classes.index(NORMAL)
    score_N = cancer_probability(predictions.probabilities_NC, classes)
    has_both = is_N.any() and not is_N.all()
    return {
        "rule": _rule(cancer),
        "difference": _difference(cancer, test.confusion_matrix, classes),
        "calibration": _calibration(calibration_line(is_N, score_N, ClusterBootstrap(predictions.groups_N))),
        "roc": test_charts.cancer_roc(is_N, score_N, cancer) if has_both else None,
        "decision": test_charts.decision(is_N, score_N) if has_both else None,
    }


def _rule(cancer: CancerMetrics) -> str:
    how = "is one half" if cancer.threshold == HALF else "was chosen on other images that the model was not trained on"
    return (
        f"An image counts as cancer if the probability of all cancers together is above {percent(cancer.threshold)}. "
        f"This threshold, the operating point, {how}."
    )


def _difference(cancer: CancerMetrics, matrix: list[list[int]], classes: tuple[str, ...]) -> str:
    """Why this table and the confusion matrix differ, as text; "" if they do not."""
    normal = classes.index(NORMAL)
    normals = matrix[normal][normal]
    cancers = sum(n for c, row in enumerate(matrix) for d, n in enumerate(row) if c != normal and d != normal)
    (right_normals, _), (_, right_cancers) = cancer.table
    if (normals, cancers) == (right_normals, right_cancers):
        return ""
    return (
        f"The confusion matrix above asks for the most probable class. By it, {normals} of {cancer.n_normal} normal "
        f"images are predicted as normal, and {cancers} of {cancer.n_cancer} images of cancer as some cancer; by this "
        f"rule {right_normals} and {right_cancers}. The rule adds up the probabilities of all cancers. With 40 % "
        "normal and three cancers of 20 % each, normal is the most probable class, but cancer has 60 %."
    )


def _calibration(line: CalibrationLine | None) -> str:
    if line is None:
        return (
            "The calibration slope of the probability of cancer is not defined: it separates the images of cancer from "
            "the normal ones, or one kind is missing."
        )
    return (
        f"Calibration of the probability of cancer: slope {in_words(line.slope, '.2f')} (1 is right, less means too "
        f"extreme), intercept {in_words(line.intercept, '+.2f')} (0 is right, above 0 the probabilities are too low on "
        "average)."
    )
