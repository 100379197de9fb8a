"""How well a score ranks images of one kind above the others, at many weightings of the images at once.

scikit-learn has these figures (tests/evaluation/test_metrics.py holds them against it), one weighting a call: for 2,000
resamples of a dozen figures that is a minute where this is a second.
"""

from __future__ import annotations

import numpy as np

from lungct_tune.evaluation.bootstrap import Statistic


def auroc(is_N: np.ndarray, score_N: np.ndarray) -> Statistic:
    """Area under the ROC curve: how often one of the kind scores higher than another, ties counting half."""

    def statistic(weights_BN: np.ndarray) -> np.ndarray:
        of_kind_BU, others_BU = _by_score(weights_BN, is_N, score_N)
        below_BU = others_BU.sum(axis=1, keepdims=True) - others_BU.cumsum(axis=1)
        above = (of_kind_BU * (below_BU + others_BU / 2)).sum(axis=1)
        return np.asarray(above / (of_kind_BU.sum(axis=1) * others_BU.sum(axis=1)))

    return statistic


def average_precision(is_N: np.ndarray, score_N: np.ndarray) -> Statistic:
    """Precision at each distinct score, averaged over those of the kind, as scikit-learn does without interpolation."""

    def statistic(weights_BN: np.ndarray) -> np.ndarray:
        of_kind_BU, others_BU = _by_score(weights_BN, is_N, score_N)
        found_BU = of_kind_BU.cumsum(axis=1)
        precision_BU = found_BU / np.maximum(found_BU + others_BU.cumsum(axis=1), 1)  # weights are whole numbers
        return np.asarray((of_kind_BU * precision_BU).sum(axis=1) / of_kind_BU.sum(axis=1))

    return statistic


def sensitivity_at(specificity: float, is_N: np.ndarray, score_N: np.ndarray) -> Statistic:
    """The highest sensitivity of any threshold that has at least this specificity."""

    def statistic(weights_BN: np.ndarray) -> np.ndarray:
        of_kind_BU, others_BU = _by_score(weights_BN, is_N, score_N)
        sensitivity_BU = of_kind_BU.cumsum(axis=1) / of_kind_BU.sum(axis=1, keepdims=True)
        false_alarms_BU = others_BU.cumsum(axis=1) / others_BU.sum(axis=1, keepdims=True)
        allowed_BU = false_alarms_BU <= 1 - specificity + 1e-12
        highest_B = np.where(allowed_BU, sensitivity_BU, 0).max(axis=1)  # no threshold: nothing is called positive
        undefined_B = np.isnan(sensitivity_BU[:, 0] + false_alarms_BU[:, 0])
        return np.where(undefined_B, np.nan, highest_B)

    return statistic


def _by_score(weights_BN: np.ndarray, is_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the kind and of the others at each distinct score, (B, U) each, the highest score first."""
    order = np.argsort(-score_N, kind="stable")
    starts = np.flatnonzero(np.diff(score_N[order], prepend=np.inf))
    ranked_BN, of_kind_N = weights_BN[:, order], is_N[order]
    return (
        np.add.reduceat(ranked_BN * of_kind_N, starts, axis=1),
        np.add.reduceat(ranked_BN * ~of_kind_N, starts, axis=1),
    )
