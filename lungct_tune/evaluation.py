"""Predictions in, figures out: what a classifier is worth, with the uncertainty of saying so."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

OBJECTIVE = "balanced_accuracy"
"""What a search maximises on validation: the mean of the classes' sensitivities. A rule that always
names the largest class scores 1/C with it, however large that class is; plain accuracy would reward it."""


def accuracy_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for an accuracy of `correct` out of `n` images.

    It takes images as independent; where a group has several test images the truth is wider.
    Source: Wilson, JASA 1927, through scipy.stats.binomtest.
    """
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def validation_figures(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, float]:
    """The figures that steer a search.

    `log_loss` weighs every class alike, as the objective does, and breaks its ties: with some ten images
    of a class many epochs share a balanced accuracy.
    """
    predicted_N = probabilities_NC.argmax(axis=1)
    surprise_N = -np.log(np.clip(probabilities_NC[np.arange(len(labels_N)), labels_N], 1e-12, 1))
    per_class = [surprise_N[labels_N == label].mean() for label in np.unique(labels_N)]
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels_N, predicted_N)),
        "accuracy": float(accuracy_score(labels_N, predicted_N)),
        "log_loss": float(np.mean(per_class)),
    }


def rank(figures: dict[str, float]) -> tuple[float, float]:
    """Larger is better: by the objective, ties by the loss."""
    return figures[OBJECTIVE], -figures["log_loss"]


def judge(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, classes: tuple[str, ...], majority: int
) -> dict[str, Any]:
    """All figures of the held-out test split.

    Args:
        labels_N: true classes, as indices.
        probabilities_NC: predicted, rows sum to 1.
        classes: names, in the order of the columns.
        majority: the class that training has most images of; always naming it is the trivial rule.

    Returns:
        A dictionary for metrics.json. A figure that the split does not define (the AUROC of a class without
        images, say) is None.
    """
    n, predicted_N = len(labels_N), probabilities_NC.argmax(axis=1)
    low, high = accuracy_interval(int((predicted_N == labels_N).sum()), n)
    return {
        "n": n,
        "accuracy": float(accuracy_score(labels_N, predicted_N)),
        "accuracy_ci95": [low, high],
        "majority_rule_accuracy": float((labels_N == majority).mean()),
        "balanced_accuracy": float(recall_score(labels_N, predicted_N, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(labels_N, predicted_N, average="macro", zero_division=0)),
        "confusion_matrix": confusion_matrix(labels_N, predicted_N, labels=range(len(classes))).tolist(),
        "per_class": {
            name: _one_against_rest(labels_N == c, predicted_N == c, probabilities_NC[:, c])
            for c, name in enumerate(classes)
        },
    }


def _one_against_rest(is_N: np.ndarray, said_N: np.ndarray, score_N: np.ndarray) -> dict[str, Any]:
    positives, n = int(is_N.sum()), len(is_N)
    return {
        "n": positives,
        "sensitivity": float(recall_score(is_N, said_N)) if positives else None,
        "specificity": float(recall_score(~is_N, ~said_N)) if positives < n else None,
        "precision": float(precision_score(is_N, said_N)) if said_N.any() else None,
        "f1": float(f1_score(is_N, said_N)) if positives or said_N.any() else None,
        "auroc": float(roc_auc_score(is_N, score_N)) if 0 < positives < n else None,
    }
