"""Measures how often the confidence interval of an accuracy contains the true value, by number of groups.

python benchmarks/coverage.py [--simulations 400]

Groups have 1 to 4 images. Each group has its own beta-distributed rate, so that the results of its images have the
given correlation. A 95 % interval should contain the true value in 95 of 100 simulations. With 400 simulations the
standard error of a figure is 0.011.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from lungct_tune.evaluation.bootstrap import ClusterBootstrap

GROUPS = (3, 5, 10, 20, 50, 150)
TRUTHS, CORRELATIONS = (0.8, 0.95), (0.1, 0.9)


def coverage(groups: int, truth: float, alike: float, simulations: int) -> float:
    held = []
    for simulation in range(simulations):
        rng = np.random.default_rng([groups, simulation])
        groups_N = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
        rates_G = rng.beta(truth * (1 / alike - 1), (1 - truth) * (1 / alike - 1), groups)
        right_N = rng.random(len(groups_N)) < rates_G[groups_N]
        interval = ClusterBootstrap(groups_N, seed=simulation).rate(right_N, groups_N >= 0).ci95
        if interval:  # there is none if all resamples give the same value
            held.append(interval[0] <= truth <= interval[1])
    return float(np.mean(held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=400, metavar="N")
    asked = parser.parse_args()
    kinds = [(truth, alike) for truth in TRUTHS for alike in CORRELATIONS]
    table = Table("groups", *(f"{truth}, {alike}" for truth, alike in kinds), title="accuracy, correlation in a group")
    for groups in GROUPS:
        held = [coverage(groups, truth, alike, asked.simulations) for truth, alike in kinds]
        table.add_row(str(groups), *(f"{share:.3f}" for share in held))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
