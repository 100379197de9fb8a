"""Calibration: temperature scaling, and the calibration errors before and after it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, softmax

from lungct_tune.evaluation.bootstrap import RESAMPLES, ClusterBootstrap, group_weights
from lungct_tune.experiment.metrics import CalibrationErrors, Figure, FittedOn, ReliabilityBins, TemperatureScaling

TEMPERATURES = (0.2, 5.0)
"""The range of the fitted temperature."""

PRIOR = 0.5
"""The standard deviation of the prior of the temperature's logarithm, whose mean is 0.

Validation has few groups, and the trial was chosen on them. An example on phantoms: validation had 24 images of 8
groups, with an accuracy of 0.71 for the chosen model; on test it was 0.35. Without a prior the fitted temperature was
0.2, and the Brier score on test rose from 0.74 to 1.04. With this prior the temperature is 0.64 and the score 0.80.
From some fifty groups on the prior hardly matters.
"""

BINS = 10
"""Of equal width, for the calibration error and the reliability diagram."""

NEWTON_STEPS = 60
"""At most. Each changes a coefficient by 1 or less; some six are enough for most regressions."""

_LEAST = 1e-45  # the smallest float32 above 0


def calibrated(probabilities_NC: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities (float64) after the logits are divided by a temperature (Guo et al., ICML 2017).

    A temperature above 1 makes them less confident, below 1 more confident; `1 / temperature` undoes it. The predicted
    class (the largest of float32 probabilities, the first of equals) stays the same for any temperature in
    `TEMPERATURES`. A sum over classes may change order: three cancers at 0.2 each are together above normal at 0.4, but
    may be below it after a temperature below 1.
    """
    logits_NC = np.log(np.maximum(probabilities_NC.astype(float), _LEAST))
    return np.asarray(softmax(logits_NC / temperature, axis=1))


def fit_temperature(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, groups_N: np.ndarray, what: str
) -> TemperatureScaling:
    """Fits the most probable temperature for these predictions and `PRIOR`. The images of a group count as one image.

    Each image has the weight 1 / size of its group, because the predictions of a group are mostly right or wrong
    together.

    Args:
        probabilities_NC: of images that the model was not trained on.
        groups_N: the group of each image.
        what: whose predictions they are, as text.
    """
    rows = np.arange(len(labels_N))
    weights_N = group_weights(groups_N)

    def negative_log_posterior(log_temperature: float) -> float:
        likelihood_N = calibrated(probabilities_NC, np.exp(log_temperature))[rows, labels_N]
        negative_log_likelihood = -weights_N @ np.log(np.maximum(likelihood_N, np.finfo(float).tiny))
        return float(negative_log_likelihood + (log_temperature / PRIOR) ** 2 / 2)

    fitted: Any = minimize_scalar(negative_log_posterior, bounds=np.log(TEMPERATURES), method="bounded")
    return TemperatureScaling(float(np.exp(fitted.x)), FittedOn(len(labels_N), len(np.unique(groups_N)), what))


def calibration_errors(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, bootstrap: ClusterBootstrap
) -> CalibrationErrors:
    """Brier score and expected calibration error (ECE).

    The Brier score is the mean squared distance to the truth over all classes, 0 to 2 (Brier 1950). The ECE is the mean
    distance between confidence and accuracy over bins of the predicted class's probability (Naeini et al., AAAI 2015).

    With few images the ECE is above 0 even for perfect probabilities, because each bin deviates by chance. Resampling
    adds such a deviation again. So the lower limit of the interval is set as far below the ECE as the upper limit is
    above it, but not below 0 (simulated coverage: 0.94 to 0.96 for true errors of 0.1 and 0.2; 0.77 for 0).
    """
    truth_NC = np.eye(probabilities_NC.shape[1])[labels_N]
    bins_N, confidence_N, right_N = _bins(labels_N, probabilities_NC)
    gaps_NK = np.eye(BINS)[bins_N] * (confidence_N - right_N)[:, None]
    ece = bootstrap.figure(
        lambda weights_BN: np.abs(weights_BN @ gaps_NK).sum(axis=1) / weights_BN.sum(axis=1),
        bootstrap.effective(bootstrap.everything_N),
        within=(0, 1),
    )
    if ece.value is not None and ece.ci95:
        low, high = ece.ci95
        ece = replace(ece, ci95=(max(0.0, min(low, 2 * ece.value - high)), high))
    return CalibrationErrors(brier=bootstrap.mean(((probabilities_NC - truth_NC) ** 2).sum(axis=1)), ece=ece)


@dataclass(frozen=True)
class CalibrationLine:
    """Slope and intercept of the calibration of probabilities for two classes."""

    slope: Figure
    intercept: Figure


def calibration_line(is_N: np.ndarray, score_N: np.ndarray, bootstrap: ClusterBootstrap) -> CalibrationLine | None:
    """Slope and intercept of the calibration of probabilities for two classes (Van Calster et al., BMC Medicine 2019).

    The slope is that of a logistic regression of the truth on the logit of the probability: 1 is right, less means
    probabilities that are too extreme. The intercept is that with a slope of 1 (calibration in the large): 0 is right,
    above 0 the probabilities are too low on average.

    A resample whose probabilities separate the classes has no slope. If more than one in forty has none, the slope has
    no interval, since its upper limit is not known.

    Args:
        is_N: bool, whether the image is positive.
        score_N: its probability of being positive.

    Returns:
        None where the probabilities separate the classes, or one of them has no image: the slope has no limit then.
    """
    logits_N = logit(np.clip(score_N.astype(float), 1e-9, 1 - 1e-9))
    everything_1N = np.ones((1, len(is_N)))
    if _are_separated(everything_1N, logits_N, is_N)[0]:
        return None
    with_slope_2N = np.vstack([logits_N, everything_1N])
    start_2 = logistic_regression(everything_1N, with_slope_2N, is_N)[0]
    start_1 = logistic_regression(everything_1N, everything_1N, is_N, offset_N=logits_N)[0]
    without_slope = 0

    def slope(weights_BN: np.ndarray) -> np.ndarray:
        nonlocal without_slope
        slope_B = logistic_regression(weights_BN, with_slope_2N, is_N, start_K=start_2)[:, 0]
        slope_B[_are_separated(weights_BN, logits_N, is_N)] = np.nan
        without_slope += int(np.isnan(slope_B).sum())
        return slope_B

    def intercept(weights_BN: np.ndarray) -> np.ndarray:
        return logistic_regression(weights_BN, everything_1N, is_N, offset_N=logits_N, start_K=start_1)[:, 0]

    groups = min(bootstrap.effective(is_N), bootstrap.effective(~is_N))
    line = CalibrationLine(bootstrap.figure(slope, groups), bootstrap.figure(intercept, groups))
    return replace(line, slope=Figure(line.slope.value, None)) if without_slope > RESAMPLES / 40 else line


def _are_separated(weights_BN: np.ndarray, logits_N: np.ndarray, is_N: np.ndarray) -> np.ndarray:
    """Whether a threshold separates the two classes, (B,) bool; also where one of them is missing."""
    positive_BN, negative_BN = (np.where(weights_BN * of_class_N > 0, logits_N, np.nan) for of_class_N in (is_N, ~is_N))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows without a class, which are nan
        overlap_B = np.nanmin(positive_BN, axis=1) < np.nanmax(negative_BN, axis=1)
        overlap_B &= np.nanmin(negative_BN, axis=1) < np.nanmax(positive_BN, axis=1)
    return np.asarray(~overlap_B)


def logistic_regression(
    weights_BN: np.ndarray,
    features_KN: np.ndarray,
    is_N: np.ndarray,
    *,
    offset_N: np.ndarray | float = 0.0,
    start_K: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Coefficients (B, K) of logistic regressions of the same images with different weights, by Newton's method.

    Args:
        is_N: bool, whether the image is positive.
        offset_N: is added to each image's logit.
        start_K: coefficients to begin with.

    Returns:
        NaN where the method has not converged, for example since the classes are separated.
    """
    k = len(features_KN)
    products_KKN = (features_KN[:, None] * features_KN).reshape(k * k, -1)
    beta_BK = np.zeros((len(weights_BN), k)) + start_K
    step_BK = np.zeros_like(beta_BK)
    for _ in range(NEWTON_STEPS):
        p_BN = expit(beta_BK @ features_KN + offset_N)
        gradient_BK = (weights_BN * (is_N - p_BN)) @ features_KN.T
        curvature_BKK = ((weights_BN * p_BN * (1 - p_BN)) @ products_KKN.T).reshape(-1, k, k) + 1e-9 * np.eye(k)
        step_BK = np.clip(np.linalg.solve(curvature_BKK, gradient_BK[..., None])[..., 0], -1, 1)
        beta_BK += step_BK
        if np.abs(step_BK).max() < 1e-6:
            break
    return np.where((np.abs(step_BK) < 1e-5).all(axis=1, keepdims=True), beta_BK, np.nan)


def reliability_bins(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> ReliabilityBins:
    """For each bin that has images: mean confidence, accuracy, number of images."""
    bins_N, confidence_N, right_N = _bins(labels_N, probabilities_NC)
    of_bins = [bins_N == k for k in np.unique(bins_N)]
    return [(float(confidence_N[of].mean()), float(right_N[of].mean()), int(of.sum())) for of in of_bins]


def _bins(labels_N: np.ndarray, probabilities_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image's bin, its confidence, and whether it is right."""
    confidence_N = probabilities_NC.max(axis=1).astype(float)
    bins_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    return bins_N, confidence_N, probabilities_NC.argmax(axis=1) == labels_N
