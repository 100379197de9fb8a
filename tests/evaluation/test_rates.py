"""How many independent images the images of groups are worth, and the exact interval of a rate among them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from lungct_tune.evaluation.rates import effective_groups, effective_images, exact_limits


@pytest.mark.parametrize("hits", [0, 1, 13, 20])
def test_among_a_whole_number_of_images_the_limits_are_those_of_scipy(hits: int) -> None:
    assert exact_limits(hits / 20, 20) == pytest.approx(binomtest(hits, 20).proportion_ci(method="exact"))


def test_groups_of_one_size_count_as_they_are_and_others_as_fewer() -> None:
    assert effective_groups(np.full(7, 5)) == pytest.approx(7)
    assert effective_groups(np.array([100, 1, 1])) == pytest.approx(102**2 / 10002)


def test_images_that_agree_in_their_groups_count_as_groups_and_independent_ones_as_images() -> None:
    sizes_G = np.random.default_rng(0).integers(1, 9, 400)
    agreeing_G = sizes_G * (np.arange(400) % 3 > 0)
    independent_G = np.random.default_rng(1).binomial(sizes_G, 0.7)
    assert effective_images(sizes_G, agreeing_G) == pytest.approx(effective_groups(sizes_G), rel=0.02)
    assert effective_images(sizes_G, independent_G) == pytest.approx(sizes_G.sum(), rel=0.1)
    assert effective_images(np.ones(30, int), np.arange(30) % 2) == 30


def test_few_groups_are_worth_less_than_their_correlation_says() -> None:
    """Three groups that happen to be alike do not show that images are independent."""
    assert effective_images(np.full(3, 10), np.array([7, 7, 7])) < 30 / 4
    assert effective_images(np.full(3, 10), np.array([10, 10, 0])) == pytest.approx(3)
