"""Temperature scaling, Brier score and calibration error: against known values, and what must never change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from sklearn.metrics import brier_score_loss

from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.calibration import (
    TEMPERATURES,
    calibrated,
    calibration_errors,
    fit_temperature,
    reliability_bins,
)
from lungct_tune.experiment.metrics import FittedOn

LOGITS = st.floats(-120, 120, width=32) | st.sampled_from([0.0, 1.0])
PROBABILITIES = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 5)), elements=LOGITS).map(
    lambda logits_NC: softmax(logits_NC, axis=1).astype(np.float32)
)


@given(PROBABILITIES, st.floats(*TEMPERATURES))
def test_temperature_scaling_never_changes_the_class(probabilities_NC: np.ndarray, temperature: float) -> None:
    scaled_NC = calibrated(probabilities_NC, temperature)
    np.testing.assert_array_equal(scaled_NC.argmax(axis=1), probabilities_NC.argmax(axis=1))
    np.testing.assert_allclose(scaled_NC.sum(axis=1), 1)


@given(st.integers(0, 99), st.floats(*TEMPERATURES))
def test_its_inverse_undoes_it(seed: int, temperature: float) -> None:
    probabilities_NC = np.random.default_rng(seed).dirichlet(np.ones(4), 9).astype(np.float32)
    again_NC = calibrated(calibrated(probabilities_NC, temperature), 1 / temperature)
    np.testing.assert_allclose(again_NC, probabilities_NC, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_predictions_wrong_is_found(truth: float) -> None:
    rng = np.random.default_rng(0)
    honest_NC = softmax(rng.normal(size=(4000, 4)) * 1.5, axis=1)
    labels_N = np.array([rng.choice(4, p=row) for row in honest_NC])
    said_NC = calibrated(honest_NC, 1 / truth)
    fitted = fit_temperature(labels_N, said_NC, np.arange(4000), "made up")
    assert fitted.temperature == pytest.approx(truth, rel=0.1)
    assert fitted.fitted_on == FittedOn(images=4000, groups=4000, what="made up")
    bootstrap = ClusterBootstrap(np.arange(4000))
    before = calibration_errors(labels_N, said_NC, bootstrap)
    after = calibration_errors(labels_N, calibrated(said_NC, fitted.temperature), bootstrap)
    assert after.ece.value < 0.03 and after.brier.value <= before.brier.value + 1e-3
    if truth != 1:
        assert before.ece.value > 0.08


def test_a_few_images_move_the_temperature_less_than_many() -> None:
    """All are right, and the likeliest temperature by itself would be 0."""
    said_NC = np.tile(np.array([[0.7, 0.3]], dtype=np.float32), (60, 1))
    labels_N = np.zeros(60, dtype=int)
    few, alike, many = (
        fit_temperature(labels_N[:n], said_NC[:n], np.arange(n) // of_each, "made up").temperature
        for n, of_each in ((6, 1), (60, 10), (60, 1))
    )
    assert 1 > few > many >= TEMPERATURES[0]
    assert alike == pytest.approx(few)  # the images of a group count as one


def test_a_large_group_weighs_as_much_as_a_single_image() -> None:
    """One group of 36 images, all right, and ten single images, half of them right."""
    said_NC = np.tile(np.array([[0.7, 0.3]], dtype=np.float32), (46, 1))
    labels_N = np.array([0] * 36 + [0, 1] * 5)
    groups_N = np.array([0] * 36 + list(range(1, 11)))
    fitted = fit_temperature(labels_N, said_NC, groups_N, "made up")
    one_of_each = fit_temperature(labels_N[35:], said_NC[35:], groups_N[35:], "made up")
    assert fitted.temperature == pytest.approx(one_of_each.temperature)
    assert fitted.temperature > 1  # 6 of 11 are right, less than the 0.7 that they say
    assert fitted.fitted_on == FittedOn(images=46, groups=11, what="made up")


def test_predictions_that_are_sure_and_wrong_give_a_temperature_all_the_same() -> None:
    fitted = fit_temperature(np.array([1, 1]), np.array([[1, 0], [1, 0]], dtype=np.float32), np.arange(2), "made up")
    assert 1 < fitted.temperature <= TEMPERATURES[1]


def test_brier_score_and_calibration_error_by_hand() -> None:
    labels_N = np.array([0, 1, 1, 0])
    probabilities_NC = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    errors = calibration_errors(labels_N, probabilities_NC, ClusterBootstrap(np.arange(4)))
    assert errors.brier.value == pytest.approx(2 * (0.05**2 + 0.95**2 + 0.35**2 + 0.65**2) / 4)
    assert errors.ece.value == pytest.approx((0.95 - 0.5) / 2 + (0.65 - 0.5) / 2)
    assert reliability_bins(labels_N, probabilities_NC) == [
        (pytest.approx(0.65), 0.5, 2),
        (pytest.approx(0.95), 0.5, 2),
    ]


def test_the_brier_score_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels_N, probabilities_NC = rng.integers(4, size=60), rng.dirichlet(np.ones(4), 60)
    errors = calibration_errors(labels_N, probabilities_NC, ClusterBootstrap(np.arange(60)))
    expected = brier_score_loss(labels_N, probabilities_NC, labels=range(4), scale_by_half=False)
    assert errors.brier.value == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.2, 1.5, 2.5])
def test_the_intervals_of_both_hold_what_many_images_give(temperature: float) -> None:
    """Predictions too unsure by this temperature, judged 60 times on 200 images, and once on 100,000."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        honest_NC = softmax(rng.normal(size=(n, 4)) * 1.5, axis=1)
        labels_N = (rng.random(n)[:, None] > honest_NC.cumsum(axis=1)).sum(axis=1)
        return labels_N, calibrated(honest_NC, temperature)

    labels_N, many_NC = draw(np.random.default_rng(0), 100_000)
    bins = reliability_bins(labels_N, many_NC)
    truth = {
        "brier": ((many_NC - np.eye(4)[labels_N]) ** 2).sum(axis=1).mean(),
        "ece": sum(abs(confidence - accuracy) * n for confidence, accuracy, n in bins) / 100_000,
    }
    held = dict.fromkeys(truth, 0)
    for simulation in range(60):
        errors = calibration_errors(*draw(np.random.default_rng(1 + simulation), 200), ClusterBootstrap(np.arange(200)))
        for name, figure in (("brier", errors.brier), ("ece", errors.ece)):
            low, high = figure.ci95
            assert low <= figure.value <= high
            held[name] += low <= truth[name] <= high
    assert held["brier"] / 60 >= 0.86 and held["ece"] / 60 >= 0.86
