"""Figures with intervals that take whole groups for one observation, never single images.

The predictions for slices of one series are mostly right or wrong together. If slices were resampled one by one, each
would count as a patient, and the interval would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from lungct_tune.evaluation.rates import effective_groups, effective_images, exact_limits
from lungct_tune.experiment.metrics import Figure

RESAMPLES = 2000
INTERVAL = f"95 %, by groups: Korn-Graubard for rates, else cluster bootstrap with {RESAMPLES} resamples"
_BLOCK = 2**22  # weights that are held at once: 32 MB

Statistic = Callable[[np.ndarray], np.ndarray]
"""Computes the values (B,) of a figure from the images' weights (B, N); NaN where it is not defined."""


def group_weights(groups_N: np.ndarray) -> np.ndarray:
    """The weight of each image, 1 / size of its group, so that each group counts as one image."""
    _, group_of_N, sizes_G = np.unique(groups_N, return_inverse=True, return_counts=True)
    return np.asarray(1 / sizes_G[group_of_N])


class ClusterBootstrap:
    """Figures with intervals by groups. All resamples are the same, so that differences are paired.

    A rate of hits, such as the accuracy or a sensitivity, has the interval of Korn and Graubard: the exact one
    (Clopper-Pearson) for the number of independent images that say as much, see `effective_images`. For 12 of 12 groups
    of one size it is 0.735 to 1. A mean of rates, such as the balanced accuracy, is as far below and above its value as
    these intervals together: the distances add as squares (MOVER: Zou and Donner, Statistics in Medicine 2008), unless
    the classes are in the same groups.

    All other figures have a cluster bootstrap. A resample draws as many groups as there are, with replacement, each
    with all its images: the weight of an image is how often its group was drawn. The interval is the expanded
    percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap", Am. Stat. 2015, section 5.3). For
    few groups it is wider, in the way in which Student's t is wider than the normal distribution; groups of unequal
    sizes count as fewer (`effective_groups`). No percentile reaches beyond the worst resample, which with 3 to 5 groups
    is too near. So the interval is at least that of Student's t with the spread of the resamples' middle 68 %.

    - The AUROC, the macro F1 and others between 0 and 1 have the exact interval too, for the number of independent
      images that has the variance of the resamples: with three groups of a class, no percentile reaches beyond the
      worst of them.
    - The resamples that do not define a figure (no image of the class was drawn) are ignored.
    - A figure from fewer than two groups has no interval.
    - A difference of mean rates is less certain than its resamples show if a class has no error, because no resample
      has one. So its interval is widened by the exact limit of these classes.
    - Any other figure that is the same in all resamples has no interval. An example is the difference of two models
      that are right on the same images.

    Coverage of an accuracy (benchmarks/coverage.py): 0.95 to 1 with groups of 1 to 4 images, 0.93 to 1 with groups of
    very unequal sizes.

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

    def effective(self, among_N: np.ndarray) -> float:
        """How many groups of one size say as much as those of these images; 0 without images.

        Args:
            among_N: bool.
        """
        return effective_groups(self._sizes(among_N)) if among_N.any() else 0.0

    def figure(
        self,
        statistic: Statistic,
        groups: float,
        *,
        is_rate: bool = False,
        unseen: tuple[float, float] = (0.0, 0.0),
        within: tuple[float, float] = (-np.inf, np.inf),
    ) -> Figure:
        """A figure's value and interval by resampling, None where they are not defined.

        Args:
            groups: how many groups of one size the figure is computed from, see `effective`.
            is_rate: whether it is between 0 and 1, and has an exact interval.
            unseen: how far it may be below and above its value for what no resample shows.
            within: the least and the greatest value that it can have.
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
        if groups < 1 + 1e-9 or not len(resampled):
            return Figure(value, None)
        wider, quantile = np.sqrt(groups / (groups - 1)), t.ppf(0.975, groups - 1)
        variance = (wider * resampled.std() * quantile / norm.ppf(0.975)) ** 2
        if is_rate and (np.isclose(value, (0, 1)).any() or variance > 1e-12):
            n = np.fmax(value * (1 - value) / max(variance, 1e-12), groups)
            return Figure(value, exact_limits(float(np.clip(value, 0, 1)), float(n)))
        level = norm.cdf(-wider * quantile)
        low, minus_sd, plus_sd, high = np.quantile(resampled, [level, *norm.cdf([-1, 1]), 1 - level])
        reach = wider * quantile * (plus_sd - minus_sd) / 2
        low, high = min(low, value - reach), max(high, value + reach)
        below, above = unseen
        if below:
            low = value - np.hypot(max(value - low, 0), below)
        if above:
            high = value + np.hypot(max(high - value, 0), above)
        low, high = np.clip((low, high), *within)
        return Figure(value, None if np.isclose(low, high) else (float(low), float(high)))

    def rate(self, hit_N: np.ndarray, among_N: np.ndarray | None = None) -> Figure:
        """The share of hits among these images, or among all.

        Args:
            hit_N, among_N: bool.
        """
        return self.mean_rate(hit_N, [self.everything_N if among_N is None else among_N])

    def mean_rate(self, hit_N: np.ndarray, strata: Sequence[np.ndarray], *, is_fixed: bool = False) -> Figure:
        """The mean of the shares of hits in some strata, such as the classes.

        Args:
            hit_N: bool.
            strata: bool, (N,) each.
            is_fixed: whether the hits are those of a rule that always names one class: it is right on all of this
                class, and on nothing else.
        """
        if not all(among_N.any() for among_N in strata):
            return Figure(None, None)
        rates, below, above = [], [], []
        for among_N in strata:
            sizes_G, hits_G = self._sizes(among_N), self._sizes(among_N & hit_N)
            rate = float(hits_G.sum() / sizes_G.sum())
            low, high = exact_limits(rate, effective_images(sizes_G[sizes_G > 0], hits_G[sizes_G > 0]))
            rates.append(rate)
            below.append(rate - low if rate < 1 else 0.0)
            above.append(high - rate if rate > 0 else 0.0)
        value = float(np.mean(rates))
        if is_fixed or self.count(np.any(strata, axis=0)) < 2:
            return Figure(value, None)
        ends = zip((below, above), self._unseen(hit_N, strata), strict=True)
        lower, upper = (float(np.hypot(self._together(distances, strata), unseen)) for distances, unseen in ends)
        return Figure(value, (value - lower, value + upper))

    def mean_difference(
        self, hit_N: np.ndarray, other_N: np.ndarray, strata: Sequence[np.ndarray], *, is_fixed: bool = False
    ) -> Figure:
        """The mean of the shares of hits in some strata minus that of other hits, paired by image.

        Args:
            hit_N, other_N: bool.
            strata: bool, (N,) each.
            is_fixed: whether the other hits are those of a rule that always names one class.
        """
        gains_N = hit_N.astype(float) - other_N
        if is_fixed:
            unseen = self._unseen(hit_N, strata)
        else:
            differ = [bool((hit_N != other_N)[in_stratum_N].any()) for in_stratum_N in strata]
            ours, theirs = self._unseen(hit_N, strata, differ), self._unseen(other_N, strata, differ)
            unseen = float(np.hypot(ours[0], theirs[1])), float(np.hypot(ours[1], theirs[0]))

        def mean_share(weights_BN: np.ndarray) -> np.ndarray:
            shares = [weights_BN @ (gains_N * among_N) / (weights_BN @ among_N) for among_N in strata]
            return np.asarray(np.mean(shares, axis=0))

        return self.figure(mean_share, self.least_groups(strata), unseen=unseen, within=(-1, 1))

    def least_groups(self, strata: Sequence[np.ndarray]) -> float:
        """How many groups a mean over strata counts as: that with the fewest is the least certain, and weighs 1 / K."""
        fewest = min((self.effective(in_stratum_N) for in_stratum_N in strata), default=0.0)
        return min(self.effective(np.any(strata, axis=0)), len(strata) * fewest) if fewest else 0.0

    def _unseen(
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
            if not alike:
                return 0.0
            apart = self._together([_beyond(self.effective(in_stratum_N)) for in_stratum_N in alike], alike)
            return len(alike) / len(strata) * min(apart, _beyond(self.least_groups(alike)))

        return beyond(1.0), beyond(0.0)

    def _together(self, distances: Sequence[float], strata: Sequence[np.ndarray]) -> float:
        """How far the mean of rates in strata may be from its value if each may be so far from its own.

        The distances add as squares; those of strata in the same groups add as they are.
        """
        sizes_KG = np.array([self._sizes(in_stratum_N) for in_stratum_N in strata], dtype=float)
        sizes_KG /= np.maximum(np.linalg.norm(sizes_KG, axis=1, keepdims=True), 1)
        return float(np.linalg.norm(np.array(distances) @ sizes_KG)) / len(strata)

    def _sizes(self, among_N: np.ndarray) -> np.ndarray:
        """How many of these images are in each group, (G,)."""
        return np.bincount(self.groups_N[among_N], minlength=self._drawn_BG.shape[1])

    def mean(self, values_N: np.ndarray) -> Figure:
        """The mean over the images of values that are not negative."""
        return self.figure(
            lambda weights_BN: weights_BN @ values_N / weights_BN.sum(axis=1),
            self.effective(self.everything_N),
            within=(0, np.inf),
        )


def _beyond(groups: float) -> float:
    """The distance from a rate of 0 or 1 to its exact limit."""
    return 1 - exact_limits(1.0, groups)[0]
