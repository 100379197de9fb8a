"""Intervals of rates, such as a sensitivity, from images in groups of any sizes.

The images of a group are mostly right or wrong together, so they say less than as many images of different patients.
And few large groups among many small ones decide. A bootstrap sees neither well where errors are few: if no large group
happens to be wrong, its interval is far too narrow.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, t


def exact_limits(rate: float, n: float) -> tuple[float, float]:
    """The Clopper-Pearson interval of a rate among so many independent images, which need not be a whole number."""
    hits = rate * n
    low = beta.ppf(0.025, hits, n - hits + 1) if rate > 0 else 0.0
    return float(low), float(beta.ppf(0.975, hits + 1, n - hits)) if rate < 1 else 1.0


def effective_groups(sizes_G: np.ndarray) -> float:
    """How many groups of one size say as much about a mean over images (Kish, Survey Sampling, 1965)."""
    return float(sizes_G.sum() ** 2 / (sizes_G.astype(float) ** 2).sum())


def effective_images(sizes_G: np.ndarray, hits_G: np.ndarray) -> float:
    """How many independent images say as much about the rate of hits (Korn and Graubard, Survey Methodology 1998).

    The correlation in a group is that of Fleiss and Cuzick (Applied Psychological Measurement 1979). It asks how often
    the images of a group differ, so that a small group which is all wrong counts as much as a large one. At rates of 0
    and 1 it is not known, and taken for 1. As it comes from few groups, the number is lowered by Student's t, though
    not below the number of effective groups.

    Args:
        sizes_G: images of each group, at least one.
        hits_G: how many of them are hits.
    """
    n, groups, effective = sizes_G.sum(), len(sizes_G), effective_groups(sizes_G)
    rate = hits_G.sum() / n
    if n == groups or rate in (0, 1):
        return effective
    within = (hits_G * (sizes_G - hits_G) / sizes_G).sum() / ((n - groups) * rate * (1 - rate))
    independent = n / (1 + (n / effective - 1) * np.clip(1 - within, 0, 1))
    few = t.ppf(0.975, n - 1) / t.ppf(0.975, effective - 1)
    return float(np.fmax(independent * few**2, effective))
