"""The objective of a search and the other validation figures, computed in every worker."""

from __future__ import annotations

import numpy as np

OBJECTIVE = "balanced_accuracy"
"""What a search maximises on validation: the mean of the classes' sensitivities. A model that always predicts the
largest class scores only 1/C, for any size of that class; its plain accuracy would be higher."""


def validation_figures(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """Balanced accuracy, accuracy and negative log-likelihood ("log_loss").

    "log_loss" gives every class the same weight, as the objective does. It breaks ties of the objective: with about ten
    images per class, many epochs have the same balanced accuracy.

    scikit-learn has the accuracies too (tests/evaluation/test_metrics.py compares them with these). But its import
    takes 1.3 s per process, and each worker of a search is a process.
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
    """How a trial's figures were measured, as text for axes, tables and sentences."""
    return f"in {folds}-fold cross-validation" if folds and folds > 1 else "on validation"


OBJECTIVE_NAME = OBJECTIVE.replace("_", " ")
