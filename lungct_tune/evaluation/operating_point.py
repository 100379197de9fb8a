"""Chooses the probability above which an image counts as cancer, on images that the model was not trained on."""

from __future__ import annotations

import numpy as np

from lungct_tune.evaluation.bootstrap import group_weights
from lungct_tune.evaluation.metrics import NORMAL, SPECIFICITY, are_cancer_and_normal, cancer_probability
from lungct_tune.experiment.metrics import HALF, FittedOn, OperatingPoint


def choose_operating_point(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, classes: tuple[str, ...], groups_N: np.ndarray, what: str
) -> OperatingPoint | None:
    """The threshold with the highest mean of sensitivity and specificity for cancer (Youden, Cancer 1950).

    And the lowest threshold with a specificity of at least `SPECIFICITY`, which of these has the highest sensitivity.
    Candidates are 0.5, the middles between neighbouring probabilities, and the highest probability. Of equals, the one
    nearest to 0.5 is chosen.
    The images of a group count as one image.

    Args:
        probabilities_NC: calibrated, of images that the model was not trained on.
        groups_N: the group of each image.
        what: whose predictions they are, as text.

    Returns:
        None where the classes are not normal and cancers, or one of the two has no images.
    """
    if not are_cancer_and_normal(classes):
        return None
    is_N, score_N = labels_N != classes.index(NORMAL), cancer_probability(probabilities_NC, classes)
    if is_N.all() or not is_N.any():
        return None
    weights_N = group_weights(groups_N)
    scores_U = np.unique(score_N)
    candidates_T = np.array([*(scores_U[1:] + scores_U[:-1]) / 2, scores_U[-1], HALF])
    sensitivity_T = _share_above(candidates_T, score_N[is_N], weights_N[is_N])
    specificity_T = 1 - _share_above(candidates_T, score_N[~is_N], weights_N[~is_N])
    mean_T = (sensitivity_T + specificity_T) / 2
    best_T = candidates_T[mean_T >= mean_T.max() - 1e-9]
    threshold = float(best_T[np.abs(best_T - HALF).argmin()])
    specific = float(candidates_T[specificity_T >= SPECIFICITY - 1e-9].min())
    return OperatingPoint(threshold, FittedOn(len(labels_N), len(np.unique(groups_N)), what), specific)


def _share_above(thresholds_T: np.ndarray, score_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """The weighted share of the scores that are above each threshold."""
    order = np.argsort(score_N)
    below_N = np.concatenate([[0], np.cumsum(weights_N[order])])
    return np.asarray(1 - below_N[np.searchsorted(score_N[order], thresholds_T, side="right")] / below_N[-1])
