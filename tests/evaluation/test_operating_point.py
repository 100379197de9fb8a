"""The threshold for cancer against normal, chosen on validation."""

from __future__ import annotations

import numpy as np
import pytest

from lungct_tune.evaluation.operating_point import choose_operating_point


def test_the_operating_point_is_where_sensitivity_and_specificity_are_highest() -> None:
    classes = ("adenocarcinoma", "normal")
    cancer_N = np.array([0.95, 0.9, 0.85, 0.8, 0.72, 0.4, 0.3, 0.2])
    labels_N = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    point = choose_operating_point(labels_N, np.stack([cancer_N, 1 - cancer_N], 1), classes, np.arange(8), "test")
    assert point is not None and point.threshold == pytest.approx(0.76) and point.chosen_on.groups == 8
    assert point.at_95_specificity == pytest.approx(0.76)
    overlapping_N = np.array([1, 0, 0, 0, 0, 1, 1, 1])  # the highest score is of a normal image
    strict = choose_operating_point(overlapping_N, np.stack([cancer_N, 1 - cancer_N], 1), classes, np.arange(8), "test")
    assert strict is not None and strict.at_95_specificity == 0.95 and strict.threshold < 0.72
    easy = choose_operating_point(labels_N, np.eye(2)[labels_N], classes, np.arange(8), "test")
    assert easy is not None and easy.threshold == 0.5
    assert choose_operating_point(labels_N, np.eye(2)[labels_N], ("a", "b"), np.arange(8), "test") is None
    assert choose_operating_point(labels_N * 0, np.eye(2)[labels_N], classes, np.arange(8), "test") is None
