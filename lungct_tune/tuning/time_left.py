"""How long a search will still take, as a range, with the retraining and the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import parse_space
from lungct_tune.experiment.forecast import Forecast, Progress, Workload, as_range
from lungct_tune.experiment.trial import TrialRecord
from lungct_tune.training.pace import Pace

BAR_WIDTH = 24

TIMES_PLAYED, REST = 30, 50
"""How often the rest of a search is played for a new forecast, and how many times as long none is made after that."""


class TimeLeft:
    """Estimates the time to the end of a search.

    The forecast says how long the rest takes, at the pace that was measured since. The latest end is never put off,
    unless even the earliest end would be after it.

    Args:
        work: of the whole search.
        earlier: the trials that have begun before this run.
        forecast: of the whole search; without one, a rough one is used as soon as an epoch has been timed.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        work: Workload,
        earlier: Sequence[TrialRecord],
        forecast: Forecast | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work, self._now = work, now
        self._is_rough = forecast is None
        self._forecast = forecast or _rough_forecast(work)
        self._made = (-math.inf, 0.0, (0.0, 0.0))
        """The last forecast: from when on another is made, when it was made, and its range."""
        self._hyperparameters: dict[int, Hyperparameters] = {}
        self._training_s = self._foreseen_s = 0.0
        """Of the epochs that were trained: how long they took, and what the forecast has for them."""
        self.has_started = False
        """Whether an epoch has been trained in this run."""
        self._reached: dict[int, set[int]] = {rung: set() for rung in work.rungs}
        """The numbers of the trials that have reached each rung."""
        self._running: dict[int, int] = {}
        self._ended = 0
        self._retrainings: Mapping[str, Hyperparameters] = {}
        self._retraining: Mapping[str, int] | None = None
        """The last epoch of each of them that has not ended; None before they start."""
        self._final_slots = 1
        """How many of them have been seen to run at the same time."""
        self._seeds: dict[int, tuple[Hyperparameters, int]] | None = None
        """Hyperparameters and last epoch of each training with another seed; None before they start."""
        self._latest: float | None = None
        """When the search will have ended, at the latest, by the clock."""
        for trial in earlier:
            self._hyperparameters[trial.number] = trial.hyperparameters
            if self._is_rough:
                self._time(trial.hyperparameters, [figures.seconds for figures in trial.history])
            if trial.is_finished:
                self._reach(trial.number, len(trial.history))
                self._ended += 1
        self._earlier_s, self._start, self._share = sum(trial.seconds for trial in earlier) / work.slots, now(), 0.0

    def add(self, number: int, hyperparameters: Hyperparameters, epoch: int, seconds: Sequence[float]) -> None:
        """Counts epochs of a trial that runs.

        Args:
            epoch: its last one.
            seconds: of each epoch that was trained.
        """
        self._hyperparameters[number] = hyperparameters
        self._reach(number, epoch)
        self._running[number] = epoch
        self._time(hyperparameters, seconds)
        self.has_started |= bool(seconds)

    def end(self, trial: TrialRecord) -> None:
        """Counts a trial that has ended."""
        self._running.pop(trial.number, None)
        self._ended += 1

    def search_ended(self) -> None:
        """From now on only what follows the search is left."""
        self._ended, self._running = self._work.trials, {}

    def retrain(self, retrainings: Mapping[str, Hyperparameters]) -> None:
        """The retrainings start, of one model each, in this order; their keys are names for `retrained`."""
        self._retrainings, self._retraining = retrainings, dict.fromkeys(retrainings, 0)
        self._made = (-math.inf, 0.0, (0.0, 0.0))

    def retrained(self, epochs: Mapping[str, int]) -> None:
        """The retrainings have trained so many epochs; those that are missing have ended."""
        self._retraining = epochs
        self._final_slots = max(self._final_slots, sum(epoch > 0 for epoch in epochs.values()))

    def train_seeds(self, trainings: Mapping[int, Hyperparameters]) -> None:
        """The trainings with other seeds start, in this order; their keys are numbers for `note_seed`."""
        self._retraining, self._seeds = {}, {number: (this, 0) for number, this in trainings.items()}
        self._made = (-math.inf, 0.0, (0.0, 0.0))

    def note_seed(self, number: int, epoch: int) -> None:
        """A training with another seed has trained so many epochs: all, if it has ended."""
        assert self._seeds is not None
        self._seeds[number] = self._seeds[number][0], epoch

    def report(self) -> None:
        """Only the bundle and the report are left."""
        self._retraining, self._seeds = {}, {}
        self._made = (-math.inf, 0.0, (0.0, 0.0))

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Seconds left, at least and at most; None without a forecast as long as no epoch has been timed."""
        if self._is_rough and not self._foreseen_s:
            return None
        low, high = self._from_forecast()
        now = self._now()
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
        """A bar of the epochs of all retrainings; empty if there are none."""
        if (left := self._retraining) is None:
            return Text("")
        each = self._work.epochs
        epochs = each * len(self._retrainings)
        done = epochs - sum(each - epoch for epoch in left.values())
        return _bar(done, epochs, f"epoch {done} of {epochs}")

    def __str__(self) -> str:
        left = self.seconds
        return "time left: known after the first epoch" if left is None else f"{as_range(*left)} left"

    def _reach(self, number: int, epoch: int) -> None:
        for rung, trials in self._reached.items():
            if rung <= epoch:
                trials.add(number)  # once, also if lost workers make it train the epochs before again

    def _time(self, hyperparameters: Hyperparameters, seconds: Sequence[float]) -> None:
        self._training_s += sum(seconds)
        self._foreseen_s += len(seconds) * self._forecast.epoch_s(hyperparameters)

    def _from_forecast(self) -> tuple[float, float]:
        now = self._now()
        due, made, (low, high) = self._made
        if now >= due:
            began, made = time.perf_counter(), now
            low, high = self._forecast.left(self._progress, TIMES_PLAYED)
            self._made = now + REST * (time.perf_counter() - began), made, (low, high)
        return max(0.0, low - (now - made)), max(0.0, high - (now - made))

    @property
    def _progress(self) -> Progress:
        running = [(number, self._hyperparameters[number], epoch) for number, epoch in list(self._running.items())]
        left, seeds = self._retraining, self._seeds
        if left is not None:  # those that have begun run in the slots that have workers
            after = sorted(((self._retrainings[name], epoch) for name, epoch in left.items()), key=lambda one: -one[1])
        return Progress(
            ended=self._ended,
            running=running,
            reached={rung: len(trials) for rung, trials in self._reached.items()},
            slowness=self._training_s / self._foreseen_s if self._foreseen_s else None,
            started=self.has_started,
            winner=next(iter(self._retrainings.values()), None),
            retraining=None if left is None else after,
            final_slots=self._final_slots,
            seeds=None if seeds is None else sorted(seeds.values(), key=lambda one: -one[1]),
        )


def _rough_forecast(work: Workload) -> Forecast:
    """A forecast where the pace could not be measured: epochs take time in proportion to their depth."""
    space = parse_space("truncation_depth: {low: 4, high: 49}", "")
    return Forecast(replace(work, test_images=0), space, Pace("", 0.0, 0.0, 1, (49,), (5.0,), (1.2,)))


def _bar(done: float, total: float, text: str) -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_row(ProgressBar(total=total, completed=done, width=BAR_WIDTH), Text(text))
    return line
