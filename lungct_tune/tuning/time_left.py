"""How long a search will still take, as a range: counted in epochs, with the retraining and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil, floor, sqrt
from statistics import fmean, pstdev

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lungct_tune.experiment.trial import BASELINE, TrialRecord

REPORT_S = (5.0, 30.0)
"""Seconds for the bundle and the report, at least and at most."""

BAR_WIDTH = 24

SPREAD = 2.0
"""The range of the epochs of trials to come, in standard errors."""


class TimeLeft:
    """Estimates the time to the end of a search from the epochs that are left.

    Trials that have ended say how many epochs the next ones take, since ASHA stops most of them early. The latest end
    is never put off, unless even the earliest end would be after it.

    Args:
        trials: of the whole search.
        rungs: the epochs after which a trial may be stopped.
        epochs: of a trial that is not stopped.
        slots: trials at the same time.
        retrainings: how many trainings follow in the retraining's slot, one after the other.
        seeds: how many more follow, in all slots.
        earlier: the trials that have begun before this run.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        trials: int,
        rungs: Sequence[int],
        epochs: int,
        slots: int,
        retrainings: int,
        seeds: int,
        earlier: Sequence[TrialRecord],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trials, self._rungs, self._epochs, self._slots = trials, rungs, epochs, slots
        self._retrainings, self._seeds, self._now = retrainings, seeds, now
        self._running: dict[int, int] = {}
        self._lengths: list[int] = []
        """Epochs of the trials that have ended, without the published configuration, which is never stopped."""
        self._ended = 0
        self._epoch_s: dict[int, float] = {}
        """Mean seconds of an epoch, by trial."""
        self._trained, self._training_s = 0, 0.0
        self._began: float | None = None
        """When the first epoch of this run began."""
        self._retrained: tuple[int, int, float] | None = None
        self._latest: float | None = None
        """When the search will have ended, at the latest, by the clock."""
        for trial in earlier:
            if trial.history:
                self._epoch_s[trial.number] = trial.seconds / len(trial.history)
            if trial.is_finished:
                self._count(trial)
        self._known_s = fmean(self._epoch_s.values()) if self._epoch_s else None
        self._earlier_s, self._start, self._share = sum(trial.seconds for trial in earlier) / slots, now(), 0.0

    def add(self, number: int, epoch: int, seconds: Sequence[float]) -> None:
        """Counts epochs of a trial that runs.

        Args:
            epoch: its last one.
            seconds: of each epoch that was trained.
        """
        self._running[number] = epoch
        if not seconds:
            return
        if self._began is None:
            self._began = self._now() - sum(seconds)
        self._trained += len(seconds)
        self._training_s += sum(seconds)
        self._epoch_s[number] = fmean(seconds)

    def end(self, trial: TrialRecord) -> None:
        """Counts a trial that has ended."""
        self._running.pop(trial.number, None)
        self._count(trial)

    def search_ended(self) -> None:
        """From now on only what follows the search is left."""
        self._ended, self._running = self._trials, {}

    def retrain(self, number: int, epochs: int) -> None:
        """A retraining of a trial starts, the next one of `retrainings`."""
        self._retrainings = max(0, self._retrainings - 1)
        self._retrained = epochs, 0, self._epoch_s.get(number, self._epoch_seconds() or 1.0)
        self._began = self._now()

    def retrained(self, epoch: int) -> None:
        """The retraining has trained so many epochs."""
        if self._retrained and epoch and self._began is not None:
            self._retrained = self._retrained[0], epoch, (self._now() - self._began) / epoch

    def report(self) -> None:
        """Only the bundle and the report are left."""
        self._retrained, self._retrainings, self._seeds = None, 0, 0

    @property
    def epochs_left(self) -> tuple[float, float]:
        """Of the search's trials: at least and at most."""
        low = high = 0.0
        for number, epoch in list(self._running.items()):
            rungs = self._rungs if number != BASELINE else ()
            low += next((rung for rung in rungs if rung > epoch), self._epochs) - epoch
            high += self._epochs - epoch
        to_come = max(0, self._trials - self._ended - len(self._running))
        least, most = self._expected_length(to_come)
        return low + to_come * least, high + to_come * most

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Seconds left, at least and at most; None as long as no epoch has been trained."""
        estimate = self._estimate()
        if estimate is None:
            return None
        now = self._now()
        low, high = estimate
        if self._latest is not None and now + low <= self._latest:
            high = min(high, self._latest - now)
        self._latest = now + high
        return low, high

    @property
    def share(self) -> float:
        """The share of the time that has passed, 0 to 1; it never falls."""
        if (left := self.seconds) is not None:
            spent = self._earlier_s + self._now() - self._start
            self._share = max(self._share, spent / (spent + left[1]) if spent else 0.0)
        return self._share

    def bar(self) -> RenderableType:
        """A bar of the time that has passed, and the time left."""
        return _bar(self.share, 1.0, f"{self}, with the report")

    def retraining_bar(self) -> RenderableType:
        """A bar of the retraining's epochs; empty if there is none."""
        if self._retrained is None:
            return Text("")
        epochs, done, _ = self._retrained
        return _bar(done, epochs, f"epoch {done} of {epochs}")

    def __str__(self) -> str:
        left = self.seconds
        return "time left: known after the first epoch" if left is None else f"{as_range(*left)} left"

    def _count(self, trial: TrialRecord) -> None:
        self._ended += 1
        if trial.number != BASELINE and trial.history:
            self._lengths.append(len(trial.history))

    def _expected_length(self, trials: int) -> tuple[float, float]:
        """Epochs of a trial to come: the range in which the mean of so many will be."""
        first = self._rungs[0] if self._rungs else self._epochs
        n = len(self._lengths)
        if n < 2 or not trials:
            return first, self._epochs
        mean = fmean(self._lengths)
        # with few trials that happen to be alike the deviation is not believed: one more counts as far from them
        deviation = sqrt((pstdev(self._lengths) ** 2 * n + (self._epochs / 3) ** 2) / (n + 1))
        width = SPREAD * deviation * sqrt(1 / n + 1 / trials)
        return max(first, mean - width), min(self._epochs, mean + width)

    def _epoch_seconds(self) -> float | None:
        return self._training_s / self._trained if self._trained else self._known_s

    def _estimate(self) -> tuple[float, float] | None:
        if (epoch_s := self._epoch_seconds()) is None:
            return None
        low, high = self.epochs_left
        overhead = 1.0
        if self._began is not None and self._training_s and not self._retrained:
            overhead = max(1.0, (self._now() - self._began) * self._slots / self._training_s)
        per_epoch = epoch_s / self._slots
        times = list(self._epoch_s.values()) or [epoch_s]
        fastest, slowest = self._epochs * min(times), self._epochs * max(times)
        after = self._retrainings + self._seeds / self._slots
        least = low * per_epoch + after * fastest + REPORT_S[0]
        most = high * per_epoch * overhead + after * slowest + REPORT_S[1]
        if self._retrained:
            epochs, done, seconds = self._retrained
            least, most = least + (epochs - done) * seconds * 0.9, most + (epochs - done) * seconds * 1.2
        return least, most


def _bar(done: float, total: float, text: str) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_row(ProgressBar(total=total, completed=done, width=BAR_WIDTH), Text(text))
    return line


def as_range(low: float, high: float) -> str:
    """A range of seconds as text: "3 to 6 min", or "about 2 h" if both ends are the same."""
    unit, name = next(
        (size, name) for size, name in ((3600, "h"), (60, "min"), (1, "s")) if high >= 1.5 * size or size == 1
    )
    least, most = floor(low / unit), ceil(high / unit)
    if least == 0:
        return f"at most {most} {name}"
    return f"about {most} {name}" if least == most else f"{least} to {most} {name}"
