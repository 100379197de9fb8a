"""The figures that steer a search, computed in every worker."""

from __future__ import annotations

import numpy as np

OBJECTIVE = "balanced_accuracy"
"""What a search maximises on validation: the mean of the classes' sensitivities. A rule that always
names the largest class scores 1/C with it, however large that class is; plain accuracy would reward it."""


def validation_figures(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """Balanced accuracy, accuracy and negative log-likelihood ("log_loss").

    The last weighs every class alike, as the objective does, and breaks its ties: with some ten images
    of a class many epochs share a balanced accuracy.

    scikit-learn has the accuracies (tests/evaluation/test_metrics.py holds these against it), but takes a process 1.3 s
    to import, and each of a search's workers is a process.
    """
    right_N = probabilities_NC.argmax(axis=1) == labels_N
    surprise_N = -np.log(np.clip(probabilities_NC[np.arange(len(labels_N)), labels_N], 1e-12, 1))
    of_classes = [labels_N == label for label in np.unique(labels_N)]
    return {
        OBJECTIVE: float(np.mean([right_N[of].mean() for of in of_classes])),
        "accuracy": float(right_N.mean()),
        "log_loss": float(np.mean([surprise_N[of].mean() for of in of_classes])),
    }


def judged(folds: int | None) -> str:
    """On what a trial's figures were measured, in words: for axes, tables and sentences."""
    return f"in {folds}-fold cross-validation" if folds else "on validation"


OBJECTIVE_NAME = OBJECTIVE.replace("_", " ")
