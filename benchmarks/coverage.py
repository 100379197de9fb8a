"""Measures how often the confidence interval of a figure contains the true value, by number of groups.

python benchmarks/coverage.py [--simulations 400]

Groups have 1 to 4 images, or very unequal numbers of them: log-normal with a median of 8, and one in twenty has more
than 50. Each group has its own beta-distributed rate, so that the results of its images have the given correlation. For
the balanced accuracy, the classes have different numbers of groups of one image. For the macro F1, they have as many
groups of 1 to 4 images, and a wrong answer is any other class. For the AUROC, a class has few groups
and the rest 60, of five images each, and scores are normal. A 95 % interval should contain the true value in 95 of 100
simulations. With 400 simulations the standard error of a figure is 0.011.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.metrics import _macro_f1
from lungct_tune.evaluation.ranking import auroc
from lungct_tune.experiment.metrics import Figure

GROUPS = (3, 5, 10, 20, 50, 150)
TRUTHS, CORRELATIONS = (0.8, 0.95), (0.1, 0.9)
OF_CLASS, OTHERS, AUROCS, SCORES_ALIKE = (3, 5, 10), 60, (0.76, 0.94), (0.2, 0.8)
CLASSES = ((3, 40, 40, 40), (10, 30, 30, 30), (20, 20, 20, 20), (5, 100), (10, 100))


def coverage(groups: int, truth: float, alike: float, simulations: int, *, is_unequal: bool = False) -> float:
    """Of the accuracy."""
    held = []
    for simulation in range(simulations):
        rng = np.random.default_rng([groups, simulation])
        groups_N = _draw_groups(rng, groups, is_unequal)
        right_N = _draw_right(rng, groups_N, truth, alike)
        held += _held(ClusterBootstrap(groups_N, seed=simulation).rate(right_N), truth)
    return float(np.mean(held))


def difference_coverage(groups: int, alike: float, simulations: int, *, is_unequal: bool) -> float:
    """Of the difference between accuracies of 0.8 and 0.75: half of the images have the same answer of both models."""
    held = []
    for simulation in range(simulations):
        rng = np.random.default_rng([groups, simulation])
        groups_N = _draw_groups(rng, groups, is_unequal)
        right_N, other_N = (_draw_right(rng, groups_N, truth, alike) for truth in (0.8, 0.7))
        other_N = np.where(rng.random(len(groups_N)) < 0.5, right_N, other_N)
        bootstrap = ClusterBootstrap(groups_N, seed=simulation)
        held += _held(bootstrap.mean_difference(right_N, other_N, [bootstrap.everything_N]), 0.05)
    return float(np.mean(held))


def _draw_groups(rng: np.random.Generator, groups: int, is_unequal: bool) -> np.ndarray:
    """The group of each image."""
    sizes_G = 1 + rng.lognormal(2, 1.2, groups).astype(int) if is_unequal else rng.integers(1, 5, groups)
    return np.repeat(np.arange(groups), sizes_G)


def _draw_right(rng: np.random.Generator, groups_N: np.ndarray, truth: float, alike: float) -> np.ndarray:
    """Whether a model with this accuracy is right on each image."""
    rates_G = rng.beta(truth * (1 / alike - 1), (1 - truth) * (1 / alike - 1), groups_N[-1] + 1)
    right_N: np.ndarray = rng.random(len(groups_N)) < rates_G[groups_N]
    return right_N


def balanced_coverage(groups: tuple[int, ...], truth: float, simulations: int) -> float:
    """Of the balanced accuracy, with this sensitivity of each class."""
    held, class_N = [], np.repeat(np.arange(len(groups)), groups)
    classes = [class_N == c for c in range(len(groups))]
    for simulation in range(simulations):
        right_N = np.random.default_rng([*groups, simulation]).random(len(class_N)) < truth
        bootstrap = ClusterBootstrap(np.arange(len(class_N)), seed=simulation)
        held += _held(bootstrap.mean_rate(right_N, classes), truth)
    return float(np.mean(held))


def macro_f1_coverage(
    groups: tuple[int, ...], truth: float, alike: float, simulations: int, *, is_unequal: bool = False
) -> float:
    """Of the macro F1, with this sensitivity of each class; all wrong classes are equally likely."""
    held, k, class_of_G = [], len(groups), np.repeat(np.arange(len(groups)), groups)
    share_C = np.array(groups) / sum(groups)
    predicted_C = truth * share_C + (1 - truth) * (1 - share_C) / (k - 1)
    true_f1 = float(np.mean(2 * truth * share_C / (share_C + predicted_C)))
    for simulation in range(simulations):
        rng = np.random.default_rng([*groups, simulation])
        groups_N = _draw_groups(rng, sum(groups), is_unequal)
        right_N, labels_N = _draw_right(rng, groups_N, truth, alike), class_of_G[groups_N]
        wrong_N = (labels_N + rng.integers(1, k, len(labels_N))) % k
        bootstrap = ClusterBootstrap(groups_N, seed=simulation)
        held += _held(_macro_f1(labels_N, np.where(right_N, labels_N, wrong_N), bootstrap), true_f1)
    return float(np.mean(held))


def auroc_coverage(groups: int, truth: float, alike: float, simulations: int) -> float:
    """Of the AUROC of a class with so many groups."""
    held, group_N = [], np.repeat(np.arange(groups + OTHERS), 5)
    is_N = group_N < groups
    for simulation in range(simulations):
        rng = np.random.default_rng([groups, simulation])
        of_group_N, own_N = rng.normal(size=groups + OTHERS)[group_N], rng.normal(size=len(group_N))
        score_N = np.sqrt(2) * norm.ppf(truth) * is_N + np.sqrt(alike) * of_group_N + np.sqrt(1 - alike) * own_N
        bootstrap = ClusterBootstrap(group_N, seed=simulation)
        held += _held(bootstrap.figure(auroc(is_N, score_N), groups, is_rate=True), truth)
    return float(np.mean(held))


def _held(figure: Figure, truth: float) -> list[bool]:
    """Empty if there is no interval, because all resamples give the same value."""
    return [figure.ci95[0] <= truth <= figure.ci95[1]] if figure.ci95 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=400, metavar="N")
    asked, console = parser.parse_args(), Console(highlight=False)
    kinds = [(truth, alike) for truth in TRUTHS for alike in CORRELATIONS]
    for is_unequal in (False, True):
        sizes = "groups of very unequal sizes" if is_unequal else "groups of 1 to 4 images"
        title = f"accuracy, correlation in a group; {sizes}"
        table = Table("groups", *(f"{truth}, {alike}" for truth, alike in kinds), title=title)
        for groups in GROUPS:
            held = [coverage(groups, *kind, asked.simulations, is_unequal=is_unequal) for kind in kinds]
            table.add_row(str(groups), *(f"{share:.3f}" for share in held))
        console.print(table)
    table = Table("groups", *(f"{alike}" for _ in (1, 2) for alike in CORRELATIONS))
    table.title = "difference of accuracies, correlation in a group; groups of 1 to 4 images, of very unequal sizes"
    for groups in GROUPS:
        held = [
            difference_coverage(groups, alike, asked.simulations, is_unequal=is_unequal)
            for is_unequal in (False, True)
            for alike in CORRELATIONS
        ]
        table.add_row(str(groups), *(f"{share:.3f}" for share in held))
    console.print(table)
    table = Table("groups of each class", *map(str, TRUTHS), title="balanced accuracy")
    for of_classes in CLASSES:
        held = [balanced_coverage(of_classes, truth, asked.simulations) for truth in TRUTHS]
        table.add_row(", ".join(map(str, of_classes)), *(f"{share:.3f}" for share in held))
    console.print(table)
    columns = [f"{truth}, {alike}" for truth, alike in kinds]
    for is_unequal in (False, True):
        sizes = "groups of very unequal sizes" if is_unequal else "groups of 1 to 4 images"
        table = Table("groups of each class", *columns, title=f"macro F1, correlation in a group; {sizes}")
        for of_classes in CLASSES:
            held = [macro_f1_coverage(of_classes, *kind, asked.simulations, is_unequal=is_unequal) for kind in kinds]
            table.add_row(", ".join(map(str, of_classes)), *(f"{share:.3f}" for share in held))
        console.print(table)
    kinds = [(truth, alike) for truth in AUROCS for alike in SCORES_ALIKE]
    columns = [f"{truth}, {alike}" for truth, alike in kinds]
    table = Table("groups of the class", *columns, title="AUROC, correlation of scores in a group")
    for groups in OF_CLASS:
        held = [auroc_coverage(groups, *kind, asked.simulations) for kind in kinds]
        table.add_row(str(groups), *(f"{share:.3f}" for share in held))
    console.print(table)


if __name__ == "__main__":
    main()
