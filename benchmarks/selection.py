"""Measures the difference between the winner's validation figure and the final model's figure on unseen test images.

    python benchmarks/selection.py --data chest-ctscan --folds 5 --seeds 0 1 2 3 -- --image-size 48 --trials 8

Each seed splits the images again, with a grouped fifth of them for test. Two searches run for each seed: one evaluates
trials on the validation split, one with --folds. Every search gets the arguments after `--`. Both figures are balanced
accuracies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lungct_tune.search import main as search
from lungct_tune.training.objective import OBJECTIVE


def searched(storage: Path, name: str, arguments: list[str]) -> tuple[float, float, float]:
    """The winner's figure on validation, the final model's figure on test, and the seconds of the search."""
    began = time.monotonic()
    if search(["--storage", str(storage), "--name", name, *arguments]):
        raise SystemExit(f"the search {name} failed")
    metrics = json.loads((storage / name / "best" / "metrics.json").read_text())
    validation = metrics["best_trial"][OBJECTIVE]
    return validation, metrics["test"]["balanced_accuracy"]["value"], time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("more", nargs="*", help="for every search")
    asked = parser.parse_args()
    ways = {"validation split": ["--folds", "1"], f"{asked.folds} folds": ["--folds", str(asked.folds)]}
    table = Table("seed", "trials judged on", "validation", "test", "validation - test", "seconds")
    gaps: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for seed in asked.seeds:
            for way, how in ways.items():
                name = f"seed-{seed}-{way.replace(' ', '-')}"
                arguments = ["--data", asked.data, "--split-seed", str(seed), *how, *asked.more]
                valid, test, seconds = searched(Path(folder), name, arguments)
                table.add_row(str(seed), way, f"{valid:.3f}", f"{test:.3f}", f"{valid - test:+.3f}", f"{seconds:.0f}")
                gaps[way].append(valid - test)
    console = Console(highlight=False)
    console.print(table)
    for way, of_way in gaps.items():
        apart = statistics.mean(abs(gap) for gap in of_way)
        console.print(f"{way}: {statistics.mean(of_way):+.3f} on average, {apart:.3f} apart", soft_wrap=True)


if __name__ == "__main__":
    main()
