"""The decision curve: what a model is worth to somebody who weighs a missed cancer against a false alarm."""

from __future__ import annotations

import numpy as np


def net_benefit(is_N: np.ndarray, score_N: np.ndarray, thresholds_T: np.ndarray) -> np.ndarray:
    """Net benefit at each threshold (Vickers and Elkin, Medical Decision Making 2006).

    It is the share of true positives minus the share of false positives times t / (1 - t), both of all images. Whoever
    acts on a probability of t or more takes one missed positive to be as bad as (1 - t) / t false alarms. To act on
    every image is a score of 1 for all; to act on none has a net benefit of 0.

    Args:
        is_N: bool, whether the image is positive.
        score_N: its probability of being positive.
        thresholds_T: below 1.
    """
    acts_TN = score_N >= thresholds_T[:, None]
    true_T, false_T = (acts_TN & is_N).mean(axis=1), (acts_TN & ~is_N).mean(axis=1)
    return np.asarray(true_T - false_T * thresholds_T / (1 - thresholds_T))
