"""Sets the planned time of searches of different size beside the time that they took.

    python benchmarks/plan.py                    ten searches on phantoms, some 15 minutes on two quiet CPU cores
    python benchmarks/plan.py --only 0,3,5       some of them

Each search is run as a user runs it, in a process and a Ray cluster of its own. The planned range is the one that it
prints before its slots start; the true time is from then to the bundle. The pace is measured by the first search of
each size of image, and taken from the cache by the next. Aim: the range holds the true time in nine of ten, and its
ends are within a factor of 1.6.

On a machine with other work that aim says little, so a second comparison leaves that work out. The plan is divided by
the slowdown that it assumed. The true time is divided by "waits": how much longer the processes of the search took
because they waited for a CPU, from /proc/PID/task/TID/schedstat. They also wait for each other, so that the second
true time is rather too short.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

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


class Waits(threading.Thread):
    """Notes the seconds that all threads of a process and its descendants ran, and waited for a CPU."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._threads = psutil.Process(pid), dict[int, tuple[int, int]]()
        self.notes: list[tuple[float, int, int]] = []
        self.start()

    def run(self) -> None:
        with suppress(psutil.NoSuchProcess):
            while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
                for process in (self._root, *self._root.children(recursive=True)):
                    for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                        with suppress(OSError):
                            ran, waited, _ = map(int, task.read_text().split())
                            self._threads[int(task.parent.name)] = ran, waited
                ran, waited = (sum(both) for both in zip(*self._threads.values(), strict=True))
                self.notes.append((time.time(), ran, waited))
                time.sleep(1)

    def factor(self, since: float) -> float:
        """How much longer they took than they ran, from then on."""
        first = max((note for note in self.notes if note[0] <= since), default=self.notes[0])
        ran, waited = (self.notes[-1][k] - first[k] for k in (1, 2))
        return 1 + waited / ran


@dataclass(frozen=True)
class Result:
    planned: tuple[float, float]
    slowdown: float
    took: float
    waits: float

    @property
    def holds(self) -> bool:
        return self.planned[0] <= self.took <= self.planned[1]

    @property
    def quiet(self) -> Result:
        """The same without the work of others."""
        low, high = (end / self.slowdown for end in self.planned)
        return Result((low, high), 1, self.took / self.waits, 1)

    def __str__(self) -> str:
        low, high = self.planned
        return f"{low:.0f} to {high:.0f} s, true {self.took:.0f} s{'' if self.holds else ' (outside)'}"


def run(search: tuple[int, int, int, int, str], number: int, folder: Path) -> Result:
    """Runs one search."""
    trials, epochs, slots, size, flags = search
    words = ["--trials", trials, "--epochs", epochs, "--slots", slots, "--image-size", size, "--batch-size", 16]
    command = [sys.executable, "-m", "lungct_tune.search", *map(str, words), *flags.split()]
    command += ["--weights", "none", "--name", f"s{number}", "--storage", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    waits = Waits(process.pid)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(output)
    planned = read_results(Experiment.at(str(folder), f"s{number}")).study[PLANNED]
    ended = (folder / f"s{number}" / "best" / "checksums.txt").stat().st_mtime
    began = planned["began"]
    return Result(tuple(planned["seconds"]), planned["slowdown"], ended - began, waits.factor(began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: [int(word) for word in text.split(",")])
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table, results = Table("search", "planned", "slowdown", "waits", "without the work of others"), list[Result]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for number in asked.only or range(len(SEARCHES)):
            trials, epochs, slots, size, flags = SEARCHES[number]
            result = run(SEARCHES[number], number, Path(folder))
            what = f"{trials} trials of {epochs} epochs, {slots} slots, {size} px {flags}"
            row = (what, str(result), f"{result.slowdown:.2f}", f"{result.waits:.2f}", str(result.quiet))
            table.add_row(*row)
            print(*row, sep=" | ", flush=True)
            results.append(result)
    Console(width=140).print(table)
    for what, those in (("as it was", results), ("without the work of others", [result.quiet for result in results])):
        narrow = sum(result.planned[1] <= 1.6 * result.planned[0] for result in those)
        print(f"{what}: held in {sum(r.holds for r in those)} of {len(those)}, ends within 1.6 in {narrow}")


if __name__ == "__main__":
    main()
