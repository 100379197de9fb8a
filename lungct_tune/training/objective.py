"""The figures that steer a search, computed in every worker."""

from __future__ import annotations

import numpy as np

OBJECTIVE = "balanced_accuracy"
"""What a search maximises on validation: the mean of the classes' sensitivities. A rule that always
names the largest class scores 1/C with it, however large that class is; plain accuracy would reward it."""


def validation_figures(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """Balanced accuracy, accuracy and log loss.

    `log_loss` weighs every class alike, as the objective does, and breaks its ties: with some ten images
    of a class many epochs share a balanced accuracy.

    scikit-learn has the accuracies (tests/test_evaluation.py holds these against it), but takes a process 1.3 s to
    import, and each of a search's workers is a process.
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


def rank(figures: dict[str, float]) -> tuple[float, float]:
    """Larger is better: by the objective, ties by the loss."""
    return figures[OBJECTIVE], -figures["log_loss"]


OBJECTIVE_SD = f"{OBJECTIVE}_sd"
"""The standard deviation of the objective over the folds (n - 1)."""


OBJECTIVE_NAME = OBJECTIVE.replace("_", " ")
