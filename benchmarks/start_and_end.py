"""Measures where the time of a small search goes before its first epoch and after its last.

    python benchmarks/start_and_end.py
    python benchmarks/start_and_end.py --against CHECKOUT     the same command there, beside it

It runs `python -m lungct_tune.search --trials 2 --epochs 3 --slots 1 --image-size 32` as a user does, in a process and
a Ray cluster of its own. The first run also draws the phantoms, compares the images and measures the pace of the
machine; later ones find that in the cache, and the table has their medians. Times of the command's output are taken
from outside. Times of epochs are those that the study keeps. The retraining's epochs are estimated from the winner's,
as many on train and validation. CPU seconds are those of all processes of the search up to then. Other load on the
machine changes them little. Aims on two quiet CPU cores: the first epoch starts after 18 s, and the bundle is there 8 s
after the search's last epoch, beside the retraining's epochs. Commit f89f17a had 38 s and 23 s.
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
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import psutil
from rich.console import Console
from rich.table import Table

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.results import read_results

COMMAND = "-m lungct_tune.search --trials 2 --epochs 3 --slots 1 --image-size 32 --name measured --storage results"

PRINTED = {
    "images read": " groups",
    "Ray up": "  cluster  ",
    "search announced": "searching, ",
    "retraining announced": "retraining trial",
}
"""Stages that are over when a line with this text is printed."""

TO_FIRST_EPOCH, TO_BUNDLE = "command to first epoch", "last epoch to bundle, beside retraining"


class CpuMeter(threading.Thread):
    """Notes the CPU seconds of a process and all its descendants, four times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._seconds, self.notes = psutil.Process(pid), dict[int, float](), list[tuple[float, float]]()
        self.start()

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            with suppress(psutil.NoSuchProcess):
                for process in (self._root, *self._root.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        times = process.cpu_times()
                        self._seconds[process.pid] = times.user + times.system
            self.notes.append((time.time(), sum(self._seconds.values())))
            time.sleep(0.25)

    def until(self, when: float) -> float:
        return max((seconds for at, seconds in self.notes if at <= when), default=0.0)


def histories(folder: Path) -> list[list[dict[str, Any]]]:
    """The epochs of each trial of the search in this folder, which may be of an earlier version of the program."""
    if (folder / "study.db").exists():
        study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder}/study.db")
        return [trial.user_attrs["history"] for trial in study.trials]
    trials = read_results(Experiment.at(str(folder.parent), folder.name)).trials
    return [[epoch.as_dict() for epoch in trial.history] for trial in trials]


def score(epoch: dict[str, Any]) -> float:
    return float(epoch["balanced_accuracy"])


def stages(checkout: Path, cache: Path) -> dict[str, tuple[float, float]]:
    """Runs the search of a checkout once.

    Args:
        checkout: with the package.
        cache: where it keeps phantoms, the pace of this machine and what it found about images, between runs.

    Returns:
        Wall and CPU seconds from its start to each stage, and of the two sums.
    """
    with tempfile.TemporaryDirectory(prefix="se-") as scratch:
        own = {"RAY_TMPDIR": scratch, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(checkout.resolve())}
        began = time.time()
        command = [sys.executable, "-u", *COMMAND.split()]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
        search = subprocess.Popen(command, cwd=scratch, env=environment, text=True, stdout=subprocess.PIPE)
        assert search.stdout
        at: dict[str, float] = {}
        meter = CpuMeter(search.pid)
        for line in search.stdout:
            at.setdefault("first output", time.time())
            for stage, text in PRINTED.items():
                if text in line:
                    at.setdefault(stage, time.time())
        if status := search.wait():
            raise SystemExit(f"the search in {checkout} ended with status {status}")
        at["process ended"] = time.time()
        folder = Path(scratch, "results", "measured")
        at["bundle"] = max(file.stat().st_mtime for file in (folder / "best").iterdir())
        trials = histories(folder)
    epochs = [epoch for trial in trials for epoch in trial]
    lengths = [epoch["train_s"] + epoch["valid_s"] for epoch in epochs]
    at["first epoch"] = min(epoch["at"] - length for epoch, length in zip(epochs, lengths, strict=True))
    at["last epoch"] = max(epoch["at"] for epoch in epochs)
    best = max((trial for trial in trials if len(trial) == 3), key=lambda trial: max(map(score, trial)))
    seconds = 3 * median(epoch["train_s"] for epoch in best) * 8 / 7  # train has 7 of 8 parts of both
    done = {stage: (when - began, meter.until(when)) for stage, when in sorted(at.items(), key=lambda item: item[1])}
    (last, last_cpu), (bundle, bundle_cpu) = done["last epoch"], done["bundle"]
    return done | {
        "retraining's epochs": (seconds, seconds),
        TO_FIRST_EPOCH: done["first epoch"],
        TO_BUNDLE: (bundle - last - seconds, bundle_cpu - last_cpu - seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="later runs, in turn (1)")
    asked = parser.parse_args()
    here = Path(__file__).parents[1]
    checkouts = [here] + ([asked.against] if asked.against else [])
    runs: list[list[dict[str, tuple[float, float]]]] = [[] for _ in checkouts]
    with tempfile.TemporaryDirectory(prefix="se-") as caches:
        for _ in range(1 + asked.repeats):
            for number, (checkout, done) in enumerate(zip(checkouts, runs, strict=True)):
                done.append(stages(checkout, Path(caches, str(number))))
    names = ("", " there")[: len(checkouts)]
    table = Table("stage", *(f"{what}{name}" for name in names for what in ("first use s", "later s", "CPU s")))
    for stage in runs[0][0]:
        seconds = []
        for first, *later in runs:
            seconds += [first[stage][0], *(median(run[stage][i] for run in later) for i in range(2))]
        table.add_row(stage, *(f"{each:.1f}" for each in seconds))
    Console().print(table)


if __name__ == "__main__":
    main()
