"""Ranking figures (AUROC, average precision, sensitivity at a specificity) for many weightings of the images at once.

scikit-learn has these figures for one weighting in each call (tests/evaluation/test_metrics.py compares them). For
2,000 resamples of a dozen figures it needs a minute, and this module a second.
"""

from __future__ import annotations

import numpy as np

from lungct_tune.evaluation.bootstrap import Statistic


def auroc(is_N: np.ndarray, score_N: np.ndarray) -> Statistic:
    """Area under the ROC curve: how often a positive scores higher than a negative; ties count half."""

    def statistic(weights_BN: np.ndarray) -> np.ndarray:
        of_kind_BU, others_BU = _by_score(weights_BN, is_N, score_N)
        below_BU = others_BU.sum(axis=1, keepdims=True) - others_BU.cumsum(axis=1)
        above = (of_kind_BU * (below_BU + others_BU / 2)).sum(axis=1)
        return np.asarray(above / (of_kind_BU.sum(axis=1) * others_BU.sum(axis=1)))

    return statistic


def average_precision(is_N: np.ndarray, score_N: np.ndarray) -> Statistic:
    """Precision at each distinct score, averaged over the positives, without interpolation (as in scikit-learn)."""

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
        highest_B = np.where(allowed_BU, sensitivity_BU, 0).max(axis=1)  # 0 if no threshold is allowed
        undefined_B = np.isnan(sensitivity_BU[:, 0] + false_alarms_BU[:, 0])
        return np.where(undefined_B, np.nan, highest_B)

    return statistic


def _by_score(weights_BN: np.ndarray, is_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of positives and of negatives at each distinct score, (B, U) each, the highest score first."""
    order = np.argsort(-score_N, kind="stable")
    starts = np.flatnonzero(np.diff(score_N[order], prepend=np.inf))
    ranked_BN, of_kind_N = weights_BN[:, order], is_N[order]
    return (
        np.add.reduceat(ranked_BN * of_kind_N, starts, axis=1),
        np.add.reduceat(ranked_BN * ~of_kind_N, starts, axis=1),
    )
