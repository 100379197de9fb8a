"""Intervals of the cluster bootstrap: how often they hold the truth, by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.ranking import auroc
from lungct_tune.experiment.metrics import Figure

SIMULATIONS = 100
LEAST = 0.88
"""100 simulations of a true coverage of 0.95 fall below one time in two hundred."""


@pytest.mark.parametrize("groups", [3, 5])
def test_the_interval_of_a_difference_of_few_groups_holds_the_truth(groups: int) -> None:
    """No resample is beyond the worst group, so percentiles alone hold it in 82 to 84 % of simulations."""
    held = []
    for simulation in range(2 * SIMULATIONS):
        rng = np.random.default_rng([groups, simulation])
        groups_N = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
        right_N, drawn_N = (
            rng.random(len(groups_N)) < drawn_rates(rng, groups, 0.1, truth)[groups_N] for truth in (0.8, 0.7)
        )
        other_N = np.where(rng.random(len(groups_N)) < 0.5, right_N, drawn_N)
        bootstrap = ClusterBootstrap(groups_N, seed=simulation)
        found = bootstrap.mean_difference(right_N, other_N, [bootstrap.everything_N])
        if found.ci95:  # else the models are right on the same images
            held.append(found.ci95[0] <= 0.05 <= found.ci95[1])
    assert np.mean(held) >= 0.92


@pytest.mark.parametrize(
    ("groups", "of_each", "alike", "truth"),
    [
        (150, 1, 0.001, 0.8),
        (60, 5, 0.9, 0.8),
        (20, 4, 0.5, 0.8),
        (8, 3, 0.5, 0.8),
        (4, 3, 0.9, 0.8),
        (20, 2, 0.5, 0.95),
    ],
)
def test_the_interval_of_an_accuracy_holds_the_truth(groups: int, of_each: int, alike: float, truth: float) -> None:
    """Images of a group are right or wrong together: their correlation is `alike` (beta-binomial)."""
    held = 0
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng([groups, simulation])
        groups_N = np.repeat(np.arange(groups), of_each)
        right_N = rng.random(len(groups_N)) < drawn_rates(rng, groups, alike, truth)[groups_N]
        low, high = limits(ClusterBootstrap(groups_N, seed=simulation).rate(right_N))
        held += low <= truth <= high
    assert held / SIMULATIONS >= LEAST


@pytest.mark.parametrize("truth", [0.8, 0.95])
def test_a_few_large_groups_among_many_small_ones_make_no_accuracy_surer(truth: float) -> None:
    """By chance no large group is wrong, and no resample shows that one could be."""
    held = balanced_held = 0
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        groups_N = np.repeat(np.arange(50), 1 + rng.lognormal(2, 1.2, 50).astype(int))
        right_N = rng.random(len(groups_N)) < drawn_rates(rng, 50, 0.9, truth)[groups_N]
        bootstrap = ClusterBootstrap(groups_N, seed=simulation)
        low, high = limits(bootstrap.rate(right_N))
        held += low <= truth <= high
        low, high = limits(bootstrap.mean_rate(right_N, [groups_N % 2 == 0, groups_N % 2 == 1]))
        balanced_held += low <= truth <= high
    assert held / SIMULATIONS >= LEAST and balanced_held / SIMULATIONS >= LEAST


def test_classes_in_the_same_groups_make_a_mean_over_them_no_surer() -> None:
    """The rates of the classes rise and fall together, so they do not average out."""
    groups_N, held = np.repeat(np.arange(20), 10), 0
    class_N = np.arange(200) % 2
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        right_N = rng.random(200) < drawn_rates(rng, 20, 0.9, 0.7)[groups_N]
        low, high = limits(ClusterBootstrap(groups_N).mean_rate(right_N, [class_N == 0, class_N == 1]))
        held += low <= 0.7 <= high
    assert held / SIMULATIONS >= LEAST


def test_single_images_would_claim_more_than_they_know() -> None:
    """The same slices taken for so many patients: what the grouped interval is there to avoid."""
    held = {"groups": 0, "images": 0}
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        groups_N = np.repeat(np.arange(40), 6)
        right_N = rng.random(len(groups_N)) < drawn_rates(rng, 40, 0.9, 0.8)[groups_N]
        for what, labels_N in (("groups", groups_N), ("images", np.arange(len(groups_N)))):
            low, high = limits(ClusterBootstrap(labels_N).rate(right_N))
            held[what] += low <= 0.8 <= high
    assert held["images"] / SIMULATIONS < 0.75 < LEAST <= held["groups"] / SIMULATIONS


def test_the_interval_of_an_auroc_holds_the_truth() -> None:
    held, groups_N = 0, np.repeat(np.arange(40), 3)
    is_N = groups_N % 2 == 0
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        score_N = is_N + rng.normal(size=40)[groups_N] * 0.8 + rng.normal(size=len(groups_N)) * 0.6  # variance 1
        low, high = limits(ClusterBootstrap(groups_N).figure(auroc(is_N, score_N), 20, is_rate=True))
        held += low <= norm.cdf(1 / np.sqrt(2)) <= high
    assert held / SIMULATIONS >= LEAST


def test_the_interval_of_an_auroc_reaches_beyond_the_worst_of_three_groups() -> None:
    held, groups_N = 0, np.repeat(np.arange(63), 5)
    is_N = groups_N < 3
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        score_N = is_N + rng.normal(size=63)[groups_N] * 0.9 + rng.normal(size=len(groups_N)) * np.sqrt(0.19)
        low, high = limits(ClusterBootstrap(groups_N).figure(auroc(is_N, score_N), 3, is_rate=True))
        held += low <= norm.cdf(1 / np.sqrt(2)) <= high
    assert held / SIMULATIONS >= LEAST


@pytest.mark.parametrize(("groups", "truths"), [((10, 100), (0.9, 0.9)), ((3, 40, 40, 40), (0.7, 0.9, 0.9, 0.9))])
def test_a_class_of_few_groups_without_an_error_makes_a_mean_over_classes_no_surer(
    groups: tuple[int, ...], truths: tuple[float, ...]
) -> None:
    """The few groups of a class are often all right by chance, and no resample shows that others would not be."""
    class_N, held, gains_held = np.repeat(np.arange(len(groups)), groups), 0, 0
    classes = [class_N == c for c in range(len(groups))]
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        right_N, other_N = (rng.random(len(class_N)) < np.array(truths)[class_N] - less for less in (0, 0.3))
        bootstrap = ClusterBootstrap(np.arange(len(class_N)), seed=simulation)
        low, high = limits(bootstrap.mean_rate(right_N, classes))
        held += 0 <= low <= np.mean(truths) <= high <= 1
        low, high = limits(bootstrap.mean_difference(right_N, other_N, classes))
        gains_held += low <= 0.3 <= high
    assert held / SIMULATIONS >= LEAST and gains_held / SIMULATIONS >= LEAST


def test_a_rule_that_always_names_one_class_is_certain() -> None:
    """One that happens to be right on all of a class, and on nothing of the other, is not."""
    class_N, bootstrap = np.arange(20) % 2, ClusterBootstrap(np.arange(20))
    classes = [class_N == 0, class_N == 1]
    assert bootstrap.mean_rate(class_N == 1, classes, is_fixed=True) == Figure(0.5, None)
    low, high = limits(bootstrap.mean_rate(class_N == 1, classes))
    assert (low, high) == pytest.approx((0.025 ** (1 / 10) / 2, 1 - 0.025 ** (1 / 10) / 2))


def test_a_difference_is_paired() -> None:
    """Two models that fail on the same images differ by less than their accuracies' intervals would let one think."""
    rng = np.random.default_rng(0)
    first_N = rng.random(300) < 0.8
    second_N = first_N & (rng.random(300) < 0.95)
    bootstrap = ClusterBootstrap(np.arange(300))
    low, high = limits(bootstrap.mean(first_N.astype(float) - second_N))
    assert 0 < low < high < 0.1
    accuracy = limits(bootstrap.rate(second_N))
    assert high - low < (accuracy[1] - accuracy[0]) / 1.5


def test_a_class_that_was_all_right_is_not_called_certain() -> None:
    right_N = np.ones(20, dtype=bool)
    low, high = limits(ClusterBootstrap(np.arange(20)).rate(right_N))
    assert low == pytest.approx(0.025 ** (1 / 20)) and high == 1  # Clopper-Pearson, 20 of 20
    low, high = limits(ClusterBootstrap(np.arange(20)).rate(~right_N))
    assert high == pytest.approx(1 - 0.025 ** (1 / 20)) and low == 0
    twelve_groups, right_N = ClusterBootstrap(np.arange(36) // 3), np.ones(36, dtype=bool)
    assert limits(twelve_groups.rate(right_N)) == pytest.approx((0.735, 1), abs=5e-4)


def test_what_all_resamples_agree_on_has_no_interval() -> None:
    bootstrap = ClusterBootstrap(np.arange(20))
    for difference in (0.0, 1.0):
        assert bootstrap.mean(np.full(20, difference)) == Figure(difference, None)


def test_one_group_has_no_interval_and_no_image_no_value() -> None:
    bootstrap = ClusterBootstrap(np.array([7, 7, 9]))
    assert bootstrap.rate(np.array([True, False, True]), np.array([True, True, False])) == Figure(0.5, None)
    assert bootstrap.rate(np.ones(3, bool), np.zeros(3, bool)) == Figure(None, None)


def limits(figure: Figure) -> tuple[float, float]:
    assert figure.ci95
    return figure.ci95


def drawn_rates(rng: np.random.Generator, groups: int, alike: float, truth: float) -> np.ndarray:
    return rng.beta(truth * (1 / alike - 1), (1 - truth) * (1 / alike - 1), groups)
