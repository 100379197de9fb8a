"""Figures of validation and test: against their definitions, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungct_tune.evaluation import accuracy_interval, judge, rank, validation_figures

CLASSES = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")


def one_hot(predicted: list[int], classes: int = 4) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted]


def test_wilsons_interval_of_the_published_accuracy() -> None:
    low, high = accuracy_interval(301, 315)  # 95.6 %
    assert (round(low, 3), round(high, 3)) == (0.927, 0.973)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_estimate_and_stays_in_0_to_1(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = accuracy_interval(correct, n)
    assert 0 <= low <= correct / n + 1e-12 and correct / n - 1e-12 <= high <= 1


def test_always_naming_the_largest_class_gains_nothing() -> None:
    labels = np.array([0] * 90 + [1] * 5 + [2] * 3 + [3] * 2)
    figures = validation_figures(labels, one_hot([0] * 100))
    assert figures["accuracy"] == 0.9
    assert figures["balanced_accuracy"] == 0.25


def test_log_loss_weighs_classes_alike() -> None:
    labels = np.array([0] * 9 + [1])
    probabilities = np.full((10, 2), 0.5)
    probabilities[9] = [0.75, 0.25]
    expected = (np.log(2) + np.log(4)) / 2
    assert validation_figures(labels, probabilities)["log_loss"] == pytest.approx(expected)


def test_ties_of_the_objective_go_to_the_lower_loss() -> None:
    assert rank({"balanced_accuracy": 0.5, "log_loss": 1.0}) > rank({"balanced_accuracy": 0.5, "log_loss": 2.0})
    assert rank({"balanced_accuracy": 0.6, "log_loss": 9.0}) > rank({"balanced_accuracy": 0.5, "log_loss": 0.1})


def test_figures_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    predicted = [0, 1, 1, 1, 2, 0, 3, 3]
    figures = judge(labels, one_hot(predicted), CLASSES, majority=2)
    assert figures["n"] == 8
    assert figures["accuracy"] == 0.75
    assert figures["majority_rule_accuracy"] == 0.25
    assert figures["balanced_accuracy"] == 0.75
    assert figures["confusion_matrix"] == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]]
    large = figures["per_class"]["large cell carcinoma"]
    assert large["n"] == 2 and large["sensitivity"] == 1
    assert large["specificity"] == pytest.approx(5 / 6)
    assert large["precision"] == pytest.approx(2 / 3)
    assert large["f1"] == pytest.approx(0.8)
    assert large["auroc"] == pytest.approx((5 + 0.5) / 6)  # ranks above 5 of the 6 others, ties with one


def test_a_figure_that_the_split_does_not_define_is_none_and_json() -> None:
    figures = judge(np.array([0, 0]), one_hot([0, 1]), CLASSES, majority=0)
    assert figures["per_class"]["normal"]["auroc"] is None
    assert figures["per_class"]["adenocarcinoma"]["specificity"] is None
    assert figures["confusion_matrix"][2] == [0, 0, 0, 0]
    json.dumps(figures, allow_nan=False)
