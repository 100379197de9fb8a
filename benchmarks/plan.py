"""Sets the planned time of searches of different size beside the time that they took.

    python benchmarks/plan.py                    ten searches on phantoms, some 15 minutes on two quiet CPU cores
    python benchmarks/plan.py --searches 3       the first three of them

Each search is run as a user runs it, in a process and a Ray cluster of its own. The planned range is the one that it
prints before its slots start; the true time is from then to the bundle. The pace is measured by the first search of
each size of image and batch, and taken from the cache by the next. "busy" is how much longer two processes took at the
start of a search than on a quiet machine. Aim: the range holds the true time in nine of ten, and its ends are within a
factor of 1.6.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lungct_tune.training.pace import measured_slowdown

SEARCHES = [
    # trials, epochs, slots, image size, other flags
    (2, 2, 1, 32, ""),
    (4, 4, 2, 32, ""),
    (8, 6, 2, 32, ""),
    (6, 3, 1, 32, ""),
    (3, 6, 1, 48, ""),
    (8, 4, 2, 48, ""),
    (5, 3, 2, 32, "--folds 3"),
    (4, 6, 2, 64, ""),
    (4, 4, 2, 32, "--seeds 2"),
    (12, 6, 2, 48, ""),
]


def run(search: tuple[int, int, int, int, str], number: int, folder: Path) -> tuple[list[float], float, float]:
    """Runs one search; returns the planned range, the time that it took, and how busy the machine was before."""
    trials, epochs, slots, size, flags = search
    words = ["--trials", trials, "--epochs", epochs, "--slots", slots, "--image-size", size, "--batch-size", 16]
    command = [sys.executable, "-m", "lungct_tune.search", *map(str, words), *flags.split()]
    command += ["--weights", "none", "--name", f"s{number}", "--storage", str(folder)]
    busy = measured_slowdown(2)
    began = time.time()
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stdout + process.stderr)
    metrics = json.loads((folder / f"s{number}" / "best" / "metrics.json").read_text())["search"]
    ended = (folder / f"s{number}" / "best" / "checksums.txt").stat().st_mtime
    evaluated = (folder / f"s{number}" / "best" / "metrics.json").stat().st_mtime
    assert ended - began > metrics["took_s"]
    return metrics["planned_s"], metrics["took_s"] + max(0.0, ended - evaluated), busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=len(SEARCHES))
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = Table("search", "planned", "ends", "true", "held", "busy")
    held, within = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        searches = SEARCHES[: asked.searches]
        for number, search in enumerate(searches):
            (low, high), took, busy = run(search, number, Path(folder))
            trials, epochs, slots, size, flags = search
            holds = low <= took <= high
            held, within = held + holds, within + (high / low <= 1.6)
            what = f"{trials} trials of {epochs} epochs, {slots} slots, {size} px {flags}"
            row = (what, f"{low:.0f} to {high:.0f} s", f"{high / low:.2f}", f"{took:.0f} s", "yes" if holds else "no")
            table.add_row(*row, f"{busy:.2f}")
            print(*row, f"busy {busy:.2f}", flush=True)
    Console().print(table)
    print(f"held in {held} of {len(searches)}; ends within 1.6 in {within}")


if __name__ == "__main__":
    main()
