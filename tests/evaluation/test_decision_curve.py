"""Calibration slope and intercept, and net benefit: against known values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.calibration import CalibrationLine, calibration_line
from lungct_tune.evaluation.decision_curve import net_benefit


def test_net_benefit_by_hand() -> None:
    is_N = np.array([True, True, False, False, False])
    score_N = np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    thresholds_T = np.array([0.1, 0.5])
    ours = net_benefit(is_N, score_N, thresholds_T)
    np.testing.assert_allclose(ours, [2 / 5 - 3 / 5 / 9, 1 / 5 - 1 / 5])
    np.testing.assert_allclose(net_benefit(is_N, np.ones(5), thresholds_T), [2 / 5 - 3 / 5 / 9, 2 / 5 - 3 / 5])
    assert net_benefit(is_N, is_N.astype(float), thresholds_T) == pytest.approx(2 / 5)  # a perfect model


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.7)])
def test_slope_and_intercept_are_those_that_made_the_probabilities_wrong(slope: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    logits_N = 2 * rng.normal(size=800)
    is_N = rng.random(800) < expit(slope * logits_N + shift)
    line = calibration_line(is_N, expit(logits_N), ClusterBootstrap(np.arange(800)))
    assert line is not None and line.slope.value is not None and line.intercept.value is not None
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(logits_N[:, None], is_N)
    assert line.slope.value == pytest.approx(reference.coef_[0, 0], abs=1e-4)
    assert expit(logits_N + line.intercept.value).mean() == pytest.approx(is_N.mean(), abs=1e-6)
    assert line.slope.ci95 is not None and line.slope.ci95[0] < slope < line.slope.ci95[1]
    assert line.slope.ci95[1] - line.slope.ci95[0] < 1
    if slope == 1:
        assert line.intercept.ci95 is not None and line.intercept.ci95[0] < shift < line.intercept.ci95[1]


def test_slices_of_one_patient_count_as_one_in_the_intervals_of_the_calibration() -> None:
    rng = np.random.default_rng(0)
    logits_G = 2 * rng.normal(size=60)
    is_G = rng.random(60) < expit(logits_G)
    width = []
    for copies in (1, 8):
        is_N, score_N, groups_N = (np.repeat(each, copies) for each in (is_G, expit(logits_G), np.arange(60)))
        line = calibration_line(is_N, score_N, ClusterBootstrap(groups_N))
        assert line is not None and line.slope.ci95 is not None
        width.append(line.slope.ci95[1] - line.slope.ci95[0])
    assert width[1] == pytest.approx(width[0], rel=1e-3)


def test_classes_that_the_probabilities_separate_have_no_slope() -> None:
    def line(is_N: list[bool], score_N: list[float]) -> CalibrationLine | None:
        return calibration_line(np.array(is_N), np.array(score_N), ClusterBootstrap(np.arange(len(is_N))))

    assert line([True, True, False], [0.9, 0.8, 0.3]) is None
    assert line([True, True], [0.9, 0.8]) is None
    sure = line([True, False, True, False], [1.0, 0.0, 0.0, 1.0])
    assert sure is not None and sure.slope.value is not None and np.isfinite(sure.slope.value)


def test_a_slope_that_many_resamples_do_not_have_has_no_interval() -> None:
    is_N = np.array([True] * 6 + [False] * 6)
    score_N = np.array([0.9, 0.8, 0.85, 0.7, 0.75, 0.35, 0.4, 0.2, 0.1, 0.15, 0.3, 0.25])  # one pair is the wrong way
    line = calibration_line(is_N, score_N, ClusterBootstrap(np.arange(12)))
    assert line is not None and line.slope.value is not None and line.slope.value > 1
    assert line.slope.ci95 is None and line.intercept.ci95 is not None
