"""Intervals by a cluster bootstrap, which resamples whole groups, never single images.

The predictions for slices of one series are mostly right or wrong together. If slices were resampled one by one, each
would count as a patient, and the interval would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, t

from lungct_tune.experiment.metrics import Figure

RESAMPLES = 2000
INTERVAL = f"95 % cluster bootstrap, {RESAMPLES} resamples of groups"
_BLOCK = 2**22  # weights that are held at once: 32 MB

Statistic = Callable[[np.ndarray], np.ndarray]
"""Computes the values (B,) of a figure from the images' weights (B, N); NaN where it is not defined."""


def group_weights(groups_N: np.ndarray) -> np.ndarray:
    """The weight of each image, 1 / size of its group, so that each group counts as one image."""
    _, group_of_N, sizes_G = np.unique(groups_N, return_inverse=True, return_counts=True)
    return np.asarray(1 / sizes_G[group_of_N])


class ClusterBootstrap:
    """Figures with intervals by a cluster bootstrap. All use the same resamples, so that differences are paired.

    A resample draws as many groups as there are, with replacement, each with all its images: the weight of an image is
    how often its group was drawn. The interval is the expanded percentile interval (Hesterberg, "What Teachers Should
    Know About the Bootstrap", Am. Stat. 2015, section 5.3). For few groups it is wider, in the way in which Student's t
    is wider than the normal distribution.

    - The percentiles of a figure ignore resamples that do not define it (no image of the class was drawn).
    - A figure from fewer than two groups has no interval.
    - A rate of 0 or 1 is the same in all resamples, so its percentiles would have no width. Its interval reaches to the
      Clopper-Pearson limit for the same number of independent groups: for 12 of 12 groups it is 0.735 to 1.
    - A mean of rates of which some are 0 or 1, such as the balanced accuracy, is less certain than its resamples show,
      because none of them has an error in a class without one. So its interval is widened by the Clopper-Pearson limit
      of these classes. The two distances add as squares (MOVER: Zou and Donner, Statistics in Medicine 2008).
    - Any other figure that is the same in all resamples has no interval. An example is the difference of two models
      that are right on the same images.

    Coverage (benchmarks/coverage.py: accuracies of 0.8 and 0.95, groups of 1 to 4 images with a correlation of 0.1 and
    0.9): 0.93 to 1 with 3 to 20 groups, mostly above 0.95; 0.91 to 0.96 with 50 and 150.

    Args:
        groups_N: the group of each image, numbers or names. The resamples depend on their order, not on the names.
        seed: the seed of the resamples.
    """

    def __init__(self, groups_N: np.ndarray, seed: int = 0) -> None:
        self.groups_N, names_G = pd.factorize(groups_N)
        rng, n = np.random.default_rng(seed), len(names_G)
        self._drawn_BG = np.ones((1 + RESAMPLES, n), np.uint16)  # the first row is the sample itself
        self._drawn_BG[1:] = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)

    @property
    def everything_N(self) -> np.ndarray:
        """True for each image."""
        return np.ones(len(self.groups_N), dtype=bool)

    def count(self, among_N: np.ndarray) -> int:
        """How many groups have at least one of these images.

        Args:
            among_N: bool.
        """
        return len(np.unique(self.groups_N[among_N]))

    def figure(
        self, statistic: Statistic, groups: int, *, is_rate: bool = False, unseen: tuple[float, float] = (0.0, 0.0)
    ) -> Figure:
        """A figure's value and interval, None where they are not defined.

        Args:
            groups: how many groups the figure is computed from.
            is_rate: whether it is a share between 0 and 1. At 0 and at 1 its interval has the Clopper-Pearson limit.
            unseen: how far it may be below and above its value for what no resample shows.
        """
        step = max(1, _BLOCK // max(1, len(self.groups_N)))
        with np.errstate(invalid="ignore", divide="ignore"):
            values_B = np.concatenate(
                [
                    statistic(self._drawn_BG[start : start + step, self.groups_N].astype(float))
                    for start in range(0, len(self._drawn_BG), step)
                ]
            )
        value, resampled = float(values_B[0]), values_B[1:][np.isfinite(values_B[1:])]
        if not np.isfinite(value):
            return Figure(None, None)
        if groups < 2 or not len(resampled):
            return Figure(value, None)
        level = norm.cdf(-np.sqrt(groups / (groups - 1)) * t.ppf(0.975, groups - 1))
        low, high = np.quantile(resampled, [level, 1 - level])
        below, above = unseen
        if is_rate:
            below, above = (_beyond(groups) if np.isclose(value, end) else 0.0 for end in (1, 0))
        if below:
            low = value - np.hypot(max(value - low, 0), below)
        if above:
            high = value + np.hypot(max(high - value, 0), above)
        return Figure(value, None if np.isclose(low, high) else (float(low), float(high)))

    def rate(self, hit_N: np.ndarray, among_N: np.ndarray | None = None) -> Figure:
        """The share of hits among these images, or among all.

        Args:
            hit_N, among_N: bool.
        """
        return self.mean_rate(hit_N, [self.everything_N if among_N is None else among_N])

    def mean_rate(
        self,
        hit_N: np.ndarray,
        strata: Sequence[np.ndarray],
        other_N: np.ndarray | None = None,
        *,
        is_fixed: bool = False,
    ) -> Figure:
        """The mean of the shares of hits in some strata, such as the classes; or its difference, paired by image.

        Args:
            hit_N: bool.
            strata: bool, (N,) each.
            other_N: other hits, bool. Their mean share is subtracted.
            is_fixed: whether the hits, or the other hits if they are given, are those of a rule that always names one
                class: it is right on all of this class, and on nothing else.
        """
        gains_N = hit_N.astype(float) if other_N is None else hit_N.astype(float) - other_N
        if other_N is None and is_fixed:
            unseen = 0.0, 0.0
        elif other_N is None or is_fixed:
            unseen = self.unseen(hit_N, strata)
        else:
            differ = [bool((hit_N != other_N)[in_stratum_N].any()) for in_stratum_N in strata]
            ours, theirs = self.unseen(hit_N, strata, differ), self.unseen(other_N, strata, differ)
            unseen = float(np.hypot(ours[0], theirs[1])), float(np.hypot(ours[1], theirs[0]))

        def mean_share(weights_BN: np.ndarray) -> np.ndarray:
            shares = [weights_BN @ (gains_N * among_N) / (weights_BN @ among_N) for among_N in strata]
            return np.asarray(np.mean(shares, axis=0))

        return self.figure(mean_share, self.least_groups(strata), unseen=unseen)

    def least_groups(self, strata: Sequence[np.ndarray]) -> int:
        """How many groups a mean over strata counts as: that with the fewest is the least certain, and weighs 1 / K."""
        fewest = min((self.count(in_stratum_N) for in_stratum_N in strata), default=0)
        return min(self.count(np.any(strata, axis=0)), len(strata) * fewest) if fewest else 0

    def unseen(
        self, hit_N: np.ndarray, strata: Sequence[np.ndarray], counts: Sequence[bool] | None = None
    ) -> tuple[float, float]:
        """How far a mean share of hits may be below and above its value for what no resample shows.

        This is in the strata without an error, and in those without a hit.

        Args:
            counts: for each stratum, whether it is looked at; by default all are.
        """
        shares = [float(hit_N[in_stratum_N].mean()) if in_stratum_N.any() else np.nan for in_stratum_N in strata]
        looked_at = list(zip(strata, shares, counts or [True] * len(strata), strict=True))

        def beyond(end: float) -> float:
            alike = [in_stratum_N for in_stratum_N, share, is_one in looked_at if is_one and share == end]
            return len(alike) / len(strata) * _beyond(self.least_groups(alike)) if alike else 0.0

        return beyond(1.0), beyond(0.0)

    def mean(self, values_N: np.ndarray) -> Figure:
        """The mean over the images."""
        return self.figure(
            lambda weights_BN: weights_BN @ values_N / weights_BN.sum(axis=1), self.count(self.everything_N)
        )


def _beyond(groups: int) -> float:
    """The distance from a rate of 0 or 1 to its Clopper-Pearson limit."""
    return 1 - float(binomtest(groups, groups).proportion_ci(method="exact").low)
