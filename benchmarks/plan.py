"""Sets the planned time of searches of different size beside the time that they took.

    python benchmarks/plan.py                    ten searches on phantoms, some 15 minutes on two quiet CPU cores
    python benchmarks/plan.py --only 0,3,5       some of them

Each search is run as a user runs it, in a process and a Ray cluster of its own. The planned range is the one that it
prints before its slots start; the true time is from then to the bundle. The pace is measured by the first search of
each size of image, and taken from the cache by the next. Aim: the range holds the true time in nine of ten, and its
ends are within a factor of 1.6.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.results import read_results
from lungct_tune.experiment.study import PLANNED

SEARCHES = [
    # trials, epochs, slots, image size, other flags
    (4, 5, 1, 32, ""),
    (6, 6, 2, 32, ""),
    (7, 3, 2, 32, ""),
    (5, 4, 1, 48, ""),
    (4, 8, 2, 48, ""),
    (10, 5, 2, 48, ""),
    (4, 3, 2, 32, "--folds 4"),
    (6, 4, 2, 64, ""),
    (5, 5, 2, 32, "--seeds 2"),
    (16, 6, 2, 32, ""),
]


class Result(NamedTuple):
    low: float
    high: float
    """The ends of the planned range, in seconds."""
    took: float

    @property
    def holds(self) -> bool:
        return self.low <= self.took <= self.high

    def __str__(self) -> str:
        return f"{self.low:.0f} to {self.high:.0f} s, true {self.took:.0f} s{'' if self.holds else ', outside'}"


def run(search: tuple[int, int, int, int, str], number: int, folder: Path) -> Result:
    """Runs one search."""
    trials, epochs, slots, size, flags = search
    words = ["--trials", trials, "--epochs", epochs, "--slots", slots, "--image-size", size, "--batch-size", 16]
    command = [sys.executable, "-m", "lungct_tune.search", *map(str, words), *flags.split()]
    command += ["--weights", "none", "--name", f"s{number}", "--storage", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    planned = read_results(Experiment.at(str(folder), f"s{number}")).study[PLANNED]
    ended = (folder / f"s{number}" / "best" / "checksums.txt").stat().st_mtime
    low, high = planned["seconds"]
    return Result(low, high, ended - planned["began"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: [int(word) for word in text.split(",")])
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for number in asked.only or range(len(SEARCHES)):
            trials, epochs, slots, size, flags = SEARCHES[number]
            results.append(run(SEARCHES[number], number, Path(folder)))
            print(f"{trials} trials of {epochs} epochs, {slots} slots, {size} px {flags}: {results[-1]}", flush=True)
    narrow = sum(result.high <= 1.6 * result.low for result in results)
    print(f"held in {sum(r.holds for r in results)} of {len(results)}, ends within 1.6 in {narrow}")


if __name__ == "__main__":
    main()
