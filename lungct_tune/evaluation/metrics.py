"""Predictions in, figures out: what a classifier is worth, with the uncertainty of saying so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from lungct_tune.data.folders import CANONICAL_CLASSES
from lungct_tune.evaluation.bootstrap import INTERVAL, GroupBootstrap
from lungct_tune.evaluation.calibration import calibration_figures, reliability
from lungct_tune.evaluation.ranking import auroc, average_precision, sensitivity_at

NORMAL, CANCER = "normal", "cancer"
CANCERS = (CANCER, *(name for name in CANONICAL_CLASSES if name != NORMAL))
"""The classes that are cancer when images are told apart as cancer and normal only."""

SPECIFICITY = 0.95
"""At which the sensitivity for cancer is told too: one threshold that figures of several models can be compared at."""


def evaluate_predictions(
    labels_N: np.ndarray,
    probabilities_NC: np.ndarray,
    classes: tuple[str, ...],
    groups_N: np.ndarray,
    *,
    uncalibrated_NC: np.ndarray | None = None,
    calibration: Mapping[str, Any] | None = None,
    references: Mapping[str, tuple[str, np.ndarray]] | None = None,
    overlaps_N: np.ndarray | None = None,
) -> dict[str, Any]:
    """All figures of a model on images that it had not seen.

    Args:
        labels_N: true classes, as indices.
        probabilities_NC: what the bundle says of them, rows sum to 1.
        classes: names, in the order of the columns.
        groups_N: of each image; the intervals draw groups, not images.
        uncalibrated_NC: the same without temperature scaling, where there was any.
        calibration: what `fit_temperature` has found, where there was any.
        references: other ways to name the classes of these images, each with its name and what it predicts (N,).
        overlaps_N: which of the images were learned from, they or others of their group, where that is known.

    Returns:
        A dictionary for metrics.json. Every figure is `{"value": float, "ci95": [low, high]}` (see
        `GroupBootstrap`); what the images do not define (the AUROC of a class without images, say) is None.
    """
    bootstrap, predicted_N = GroupBootstrap(groups_N), probabilities_NC.argmax(axis=1)
    plain_NC = probabilities_NC if uncalibrated_NC is None else uncalibrated_NC
    scaled_NC = None if uncalibrated_NC is None else probabilities_NC
    everything_N = np.ones(len(labels_N), dtype=bool)
    return {
        "n": len(labels_N),
        "groups": bootstrap.count(everything_N),
        "interval": INTERVAL,
        **_overall(labels_N, predicted_N, bootstrap),
        "macro_f1": _macro_f1(labels_N, predicted_N, bootstrap),
        "per_class": {
            name: {"n": int((labels_N == c).sum())}
            | _two_classes(labels_N == c, predicted_N == c, bootstrap)
            | _ranking(labels_N == c, probabilities_NC[:, c], bootstrap)
            for c, name in enumerate(classes)
        },
        "cancer_vs_normal": _cancer_against_normal(labels_N, probabilities_NC, classes, bootstrap),
        "calibration": {
            **(calibration or {"temperature": None, "fitted_on": None}),
            "before": calibration_figures(labels_N, plain_NC, bootstrap),
            "after": None if scaled_NC is None else calibration_figures(labels_N, scaled_NC, bootstrap),
            "reliability": {
                "before": reliability(labels_N, plain_NC),
                "after": None if scaled_NC is None else reliability(labels_N, scaled_NC),
            },
        },
        "confusion_matrix": confusion_matrix(labels_N, predicted_N, labels=range(len(classes))).tolist(),
        "references": {
            key: {"name": name} | _compared(labels_N, predicted_N, other_N, bootstrap)
            for key, (name, other_N) in (references or {}).items()
        },
        "leak_free": None
        if overlaps_N is None or not overlaps_N.any()
        else {
            "n": int((~overlaps_N).sum()),
            "accuracy": bootstrap.rate(labels_N == predicted_N, ~overlaps_N),
            "references": {
                key: {"name": name, "accuracy": bootstrap.rate(labels_N == other_N, ~overlaps_N)}
                for key, (name, other_N) in (references or {}).items()
            },
        },
    }


def cancer_or_normal(probabilities_NC: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """The probabilities (N, 2) of cancer, all cancers together, and of normal."""
    is_cancer_C = np.isin(classes, CANCERS)
    return np.stack([probabilities_NC[:, is_cancer_C].sum(axis=1), probabilities_NC[:, ~is_cancer_C].sum(axis=1)], 1)


def are_cancer_and_normal(classes: tuple[str, ...]) -> bool:
    """Whether these classes are normal and cancers, and nothing that is neither."""
    return NORMAL in classes and len(classes) > 1 and set(classes) <= {NORMAL, *CANCERS}


def _overall(labels_N: np.ndarray, predicted_N: np.ndarray, bootstrap: GroupBootstrap) -> dict[str, Any]:
    """Accuracy and balanced accuracy: the mean sensitivity of the classes that have images."""
    of_class_KN = labels_N == np.unique(labels_N)[:, None]
    right_N = labels_N == predicted_N
    # where all is right, the class of the fewest groups is the one that leaves most open, and counts for 1 / K
    groups = min(bootstrap.count(right_N | ~right_N), len(of_class_KN) * min(map(bootstrap.count, of_class_KN)))

    def balanced(weights_BN: np.ndarray) -> np.ndarray:
        rates_KB = [weights_BN @ (of_N & right_N) / (weights_BN @ of_N) for of_N in of_class_KN]
        return np.asarray(np.mean(rates_KB, axis=0))

    return {
        "accuracy": bootstrap.rate(right_N, right_N | ~right_N),
        "balanced_accuracy": bootstrap.figure(balanced, groups, is_rate=True),
    }


def _macro_f1(labels_N: np.ndarray, predicted_N: np.ndarray, bootstrap: GroupBootstrap) -> dict[str, Any]:
    """The mean F1 of the classes that have images or were named."""
    named = np.union1d(labels_N, predicted_N)
    of_class_KN, said_KN = labels_N == named[:, None], predicted_N == named[:, None]

    def macro(weights_BN: np.ndarray) -> np.ndarray:
        f1_KB = [
            2 * (weights_BN @ (of_N & said_N)) / (weights_BN @ of_N + weights_BN @ said_N)
            for of_N, said_N in zip(of_class_KN, said_KN, strict=True)
        ]
        return np.asarray(np.mean(f1_KB, axis=0))

    return bootstrap.figure(macro, bootstrap.count(labels_N >= 0), is_rate=True)


def _two_classes(is_N: np.ndarray, said_N: np.ndarray, bootstrap: GroupBootstrap) -> dict[str, Any]:
    return {
        "sensitivity": bootstrap.rate(said_N, is_N),
        "specificity": bootstrap.rate(~said_N, ~is_N),
        "ppv": bootstrap.rate(is_N, said_N),
        "npv": bootstrap.rate(~is_N, ~said_N),
    }


def _ranking(is_N: np.ndarray, score_N: np.ndarray, bootstrap: GroupBootstrap) -> dict[str, Any]:
    of_kind, others = bootstrap.count(is_N), bootstrap.count(~is_N)
    return {
        "auroc": bootstrap.figure(auroc(is_N, score_N), min(of_kind, others), is_rate=True),
        "average_precision": bootstrap.figure(average_precision(is_N, score_N), of_kind, is_rate=True),
    }


def _cancer_against_normal(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, classes: tuple[str, ...], bootstrap: GroupBootstrap
) -> dict[str, Any] | None:
    """The two-class question: cancer is said where the cancers together are likelier than normal.

    That is asked of the probabilities that the bundle gives: temperature scaling may have changed the answer, which it
    never does for the likeliest of all classes (see `calibrated`).
    """
    if not are_cancer_and_normal(classes):
        return None
    score_N = cancer_or_normal(probabilities_NC, classes)[:, 0]
    is_N, said_N = labels_N != classes.index(NORMAL), score_N > 0.5
    fewest = min(bootstrap.count(is_N), bootstrap.count(~is_N))
    return {
        "n_cancer": int(is_N.sum()),
        "n_normal": int((~is_N).sum()),
        "table": confusion_matrix(is_N, said_N, labels=[False, True]).tolist(),
        **_two_classes(is_N, said_N, bootstrap),
        "auroc": bootstrap.figure(auroc(is_N, score_N), fewest, is_rate=True),
        "sensitivity_at_95_specificity": bootstrap.figure(
            sensitivity_at(SPECIFICITY, is_N, score_N), fewest, is_rate=True
        ),
    }


def _compared(
    labels_N: np.ndarray, predicted_N: np.ndarray, other_N: np.ndarray, bootstrap: GroupBootstrap
) -> dict[str, Any]:
    """Another's accuracy on the same images, how much better the model is, and whether that may be chance.

    `mcnemar_p` is the exact two-sided test on the images that only one of the two names rightly (McNemar 1947). It
    takes images as independent; where groups have several, the difference's interval is what to go by.
    """
    right_N, others_N = labels_N == predicted_N, labels_N == other_N
    gained, lost = int((right_N & ~others_N).sum()), int((~right_N & others_N).sum())
    return {
        **_overall(labels_N, other_N, bootstrap),
        "difference": bootstrap.mean(right_N.astype(float) - others_N),
        "mcnemar_p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }
