"""Trainings with several seeds: their spread, and the paired difference to the published configuration."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_rel

from lungct_tune.experiment.metrics import Figure
from lungct_tune.experiment.study import compare_seeds
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome


def training(score: float, outcome: Outcome = Outcome.COMPLETED) -> EpochReport:
    return EpochReport(outcome, (EpochFigures(1, score, score, 1.0, 1.0, 1.0, 0.1),))


def test_the_gain_over_the_published_configuration_is_paired_by_seed() -> None:
    ours, theirs = [0.80, 0.70, 0.65], [0.75, 0.62, 0.61]
    found = compare_seeds([training(score) for score in ours], [training(score) for score in theirs])
    assert found.published and found.difference
    assert found.balanced_accuracy == ours and found.published.balanced_accuracy == theirs
    assert found.difference.value == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.difference.ci95 == pytest.approx((expected.low, expected.high))


def test_a_training_without_a_model_counts_with_the_lowest_score() -> None:
    out_of_memory = EpochReport(Outcome.OUT_OF_MEMORY)
    found = compare_seeds([training(0.8), training(0.9, Outcome.DIVERGED)], [training(0.5), out_of_memory])
    assert found.balanced_accuracy == [0.8, 0.0]
    assert found.published and found.published.balanced_accuracy == [0.5, 0.0]


def test_equal_differences_have_no_interval() -> None:
    found = compare_seeds([training(0.333), training(0.396)], [training(0.25), training(0.313)])
    assert found.difference == Figure(pytest.approx(0.083), None)


def test_without_the_published_configuration_there_is_no_difference() -> None:
    found = compare_seeds([training(0.8), training(0.7)])
    assert found.published is None and found.difference is None
