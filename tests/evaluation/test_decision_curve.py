"""Calibration slope and intercept, and net benefit: against known values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from lungct_tune.evaluation.calibration import calibration_line
from lungct_tune.evaluation.decision_curve import benefit_of_all, net_benefit


def test_net_benefit_by_hand() -> None:
    is_N = np.array([True, True, False, False, False])
    score_N = np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    thresholds_T = np.array([0.1, 0.5])
    ours = net_benefit(is_N, score_N, thresholds_T)
    np.testing.assert_allclose(ours, [2 / 5 - 3 / 5 / 9, 1 / 5 - 1 / 5])
    np.testing.assert_allclose(benefit_of_all(is_N, thresholds_T), [2 / 5 - 3 / 5 / 9, 2 / 5 - 3 / 5])
    assert net_benefit(is_N, is_N.astype(float), thresholds_T) == pytest.approx(2 / 5)  # a perfect model


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.7)])
def test_slope_and_intercept_are_those_that_made_the_probabilities_wrong(slope: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    logits_N = 2 * rng.normal(size=20_000)
    is_N = rng.random(20_000) < expit(slope * logits_N + shift)
    line = calibration_line(is_N, expit(logits_N))
    assert line is not None
    assert line[0] == pytest.approx(slope, abs=0.06)
    if slope == 1:
        assert line[1] == pytest.approx(shift, abs=0.06)
    assert expit(logits_N + line[1]).mean() == pytest.approx(is_N.mean(), abs=1e-6)


def test_classes_that_the_probabilities_separate_have_no_slope() -> None:
    assert calibration_line(np.array([True, True, False]), np.array([0.9, 0.8, 0.3])) is None
    assert calibration_line(np.array([True, True]), np.array([0.9, 0.8])) is None
    sure = calibration_line(np.array([True, False, True, False]), np.array([1.0, 0.0, 0.0, 1.0]))
    assert sure is not None and np.isfinite(sure).all()
