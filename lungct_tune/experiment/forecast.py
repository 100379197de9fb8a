"""How long a search takes: said before it starts, and again from what has been done while it runs.

A forecast plays the search many times. Each time it draws hyperparameters from the space for the trials whose own are
not known, lets ASHA stop trials at the rungs, gives the trials to slots in their order, and adds what follows:
retraining, comparison, seeds and the report.
The seconds of an epoch come from `training.pace`. Each time the pace is also a little wrong. The range has five sixths
of these times.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.experiment.study import REDUCTION
from lungct_tune.experiment.trial import BASELINE
from lungct_tune.training.pace import Pace

TIMES_PLAYED = 100
"""How often a search is played. Long ones are played less often, because their times differ less."""

MOST_TRIALS_PLAYED, FEWEST_TIMES = 20_000, 8

MOST_OF_ROUND = 10_000
"""The most trials that are played in one round. Those after them count as their mean."""

PERCENTILES = (8, 92)
"""The ends of the range."""

PACE_ERROR, MOST_ERROR = 0.08, 0.4
"""Standard deviation of the logarithm of all that the measured pace does not show. It grows with the slowdown."""

NORM_IMAGES, LAST_NORM_IMAGES = 64, 4096
"""Images of an estimate of batch-norm statistics: after most epochs, and after the last one (`IMAGES_FOR_NORMS` in
training/trainer.py)."""

TRIAL_S = 0.15
"""Seconds between two trials of a slot, without building the network (docs/benchmarks.md, "A further trial")."""

REPORTS_SHARE = 0.04
"""Share of the time of epochs that a slot spends on its reports to Ray Tune and the study."""

PREPARE_S = 4.0
"""Seconds from the plan until slots start: the storage is checked, and images are shared."""

START_S, ACTOR_SHARE = 2.0, 0.25
"""Seconds of Ray when slots start, and the share of a worker's start that a slot's actor takes before."""

BUNDLE_S, IMAGE_S = 2.5, 0.01
"""Seconds for the bundle and its report, and for each wrong test image in it. Most charts are drawn before."""

MOST_IMAGES = 300
"""The most wrong test images in a report."""


@dataclass(frozen=True)
class Workload:
    """What a search has to do."""

    trials: int
    epochs: int
    rungs: tuple[int, ...]
    """The epochs after which a trial may be stopped."""
    slots: int
    train_images: int
    """Of one model of a trial."""
    valid_images: int
    """Of one model of a trial."""
    searched_images: int
    """Train and validation."""
    test_images: int
    batch_size: int
    workers: int = 1
    """Of a slot."""
    folds: int = 1
    ensemble: bool = False
    """Whether the models of the winner's folds are the final model."""
    retrains: bool = True
    """Whether the winner is retrained and evaluated, and not held back."""
    compares: bool = False
    """Whether the published configuration is retrained too."""
    seeds: int = 0
    cpus: int = 1
    """Of the machine that a slot starts on; slots that start on it share them."""
    slots_of_machine: int = 1
    final_slots: int = 1
    """How many of the final models are trained at the same time."""
    final_workers: int = 1
    """Of each of these."""
    message_s: float = 0.0
    """Seconds of a message between workers that share a batch. Each batch norm sends two in a step."""

    @property
    def final_models(self) -> int:
        """How many models are trained for the final one."""
        return self.folds if self.ensemble else 1


@dataclass(frozen=True)
class Progress:
    """How far a search is. The default is its start.

    Attributes:
        ended: how many trials have ended.
        running: for each trial that runs, its number, its hyperparameters and its last epoch.
        reached: how many trials have reached each rung.
        slowness: the measured seconds of the epochs so far, divided by those that `epoch_s` has for them; None as long
            as there are none.
        started: whether the slots' workers have started.
        winner: hyperparameters of the best trial; None as long as the search has not ended.
        retraining: for each model whose retraining has not ended, its hyperparameters and its last epoch, in the order
            of their starts; None as long as the search has not ended.
        final_slots: how many slots have workers for these retrainings.
        seeds: for each training with another seed, its hyperparameters and its last epoch, those that have begun first;
            None before they start.
    """

    ended: int = 0
    running: Sequence[tuple[int, Hyperparameters, int]] = ()
    reached: Mapping[int, int] = field(default_factory=dict)
    slowness: float | None = None
    started: bool = False
    winner: Hyperparameters | None = None
    retraining: Sequence[tuple[Hyperparameters, int]] | None = None
    final_slots: int = 1
    seeds: Sequence[tuple[Hyperparameters, int]] | None = None


BEGINNING = Progress()


@dataclass(frozen=True, eq=False)
class Forecast:
    """The time that a search takes, by the pace of its workers."""

    work: Workload
    space: SearchSpace
    pace: Pace
    slowdown: float = 1.0
    """How many times longer it takes because of other work on the machine."""
    known: Sequence[Hyperparameters] = ()
    """Those of the first trials, as far as they depend on no result."""

    def total(self) -> tuple[float, float]:
        """Seconds from the plan to the bundle: at least and at most."""
        return self.left(BEGINNING)

    def left(self, progress: Progress, times: int = TIMES_PLAYED) -> tuple[float, float]:
        """Seconds to the bundle from here: at least and at most.

        Args:
            times: how often the rest of the search is played, at most.
        """
        times = max(FEWEST_TIMES, min(times, MOST_TRIALS_PLAYED // self.work.trials))
        played = [self._play(progress, round_) for round_ in range(times)]
        low, high = np.percentile(played, PERCENTILES)
        return float(low), float(high)

    def epoch_s(self, hyperparameters: Hyperparameters) -> float:
        """Seconds of an epoch of a trial: training and validation of all its models."""
        work, together = self.work, 1 if self.work.folds > 1 else self.work.workers
        seconds = self._training_s(hyperparameters, work.train_images, together)
        forward_images = min(NORM_IMAGES, work.train_images) + work.valid_images / together
        seconds += forward_images * self.pace.predict(hyperparameters.truncation_depth)
        return seconds * (math.ceil(work.folds / work.workers) if work.folds > 1 else 1)

    def retraining_s(self, hyperparameters: Hyperparameters, epochs: int) -> float:
        """Seconds of so many epochs of the retraining of a model, and of its prediction of test."""
        work, predict_s = self.work, self.pace.predict(hyperparameters.truncation_depth)
        images, workers = work.train_images if work.ensemble else work.searched_images, work.final_workers
        forward_images = min(LAST_NORM_IMAGES, images) + work.test_images / workers
        return epochs * self._training_s(hyperparameters, images, workers) + forward_images * predict_s

    @property
    def start_s(self) -> float:
        """Seconds until the slots of a machine have started: their processes share its CPUs."""
        work = self.work
        one, all_there = 1 + ACTOR_SHARE, work.slots_of_machine * (work.workers + ACTOR_SHARE) / work.cpus
        return START_S + self.pace.start_s * max(one, all_there)

    def _training_s(self, hyperparameters: Hyperparameters, images: int, workers: int) -> float:
        depth, share = hyperparameters.truncation_depth, min(self.work.batch_size, images) // workers
        steps = images // max(1, share * workers)
        step = self.pace.step(depth, hyperparameters.frozen_depth) * share / self.pace.images
        return steps * (step + (2 * depth * self.work.message_s if workers > 1 else 0.0))

    def _play(self, progress: Progress, round_: int) -> float:
        """Seconds to the bundle in one draw. More trials only add to the same draws."""
        work = self.work
        if round_ not in self._draws:
            self._draws[round_] = _Draws(self, round_)
        random = self._draws[round_]
        retraining, seeds = progress.retraining, progress.seeds
        winner = progress.winner or random.winner
        search_s = 0.0
        if retraining is None:
            search_s, completed = self._play_trials(progress, random)
            retraining = [(winner, 0)] * work.final_models if work.retrains else []
            if work.retrains and work.compares and random.luck > 1 / max(1, completed):
                retraining += [(PUBLISHED, 0)] * work.final_models
            begun = int(work.slots_of_machine * work.workers < work.cpus)  # there is room to start the first one before
        else:
            begun = min(progress.final_slots, work.final_slots)
        busy = [0.0] * begun + [self.start_s] * (work.final_slots - begun)
        after_s = _last_end(busy, [self.retraining_s(this, work.epochs - done) for this, done in retraining])
        if seeds is None:
            seeds = [(winner, 0)] * work.seeds * work.retrains
        busy = [0.0 if any(done for _, done in seeds) else self.start_s] * work.slots
        after_s += _last_end(busy, [(work.epochs - done) * self._slot_s(this) for this, done in seeds])
        wrong: float = min(MOST_IMAGES, random.share_wrong * work.test_images)
        page_s = BUNDLE_S + wrong * (IMAGE_S + 3 * self.pace.predict(winner.truncation_depth))
        slowness, error = self.slowdown, min(MOST_ERROR, PACE_ERROR * self.slowdown)
        if progress.slowness is not None:
            slowness, error = progress.slowness, PACE_ERROR
        all_s: float = (search_s + after_s) * slowness + page_s * work.retrains * self.slowdown
        return all_s * math.exp(error * random.error)

    def _slot_s(self, hyperparameters: Hyperparameters) -> float:
        """Seconds that a slot takes for an epoch of a trial."""
        return self.epoch_s(hyperparameters) * (1 + REPORTS_SHARE)

    def _play_trials(self, progress: Progress, random: _Draws) -> tuple[float, int]:
        """Seconds to the end of the last trial, and how many ran to their end."""
        work, begin = self.work, 0.0 if progress.started else PREPARE_S + self.start_s
        reached, completed, busy = dict(progress.reached), 1, list[float]()
        for number, hyperparameters, epoch in progress.running:
            last = self._last_epoch(number, epoch, random, reached)
            completed += last == work.epochs and number != BASELINE
            busy.append(begin + (last - epoch) * self._slot_s(hyperparameters))
        busy += [begin] * max(0, work.slots - len(busy))
        heapq.heapify(busy)
        end = max(busy) if progress.running else begin
        first, all_s = progress.ended + len(progress.running), 0.0
        played = max(0, min(work.trials - first, MOST_OF_ROUND))
        for number in range(first, first + played):
            last = self._last_epoch(number, 0, random, reached)
            completed += last == work.epochs and number != BASELINE
            seconds = TRIAL_S + self.pace.build_s + last * random.slot_s(number)
            end = max(end, heapq.heapreplace(busy, busy[0] + seconds) + seconds)
            all_s += seconds
        if (others := work.trials - first - played) > 0:
            end += others * all_s / played / work.slots
        return end, completed

    def _last_epoch(self, number: int, epoch: int, random: _Draws, reached: dict[int, int]) -> int:
        """The epoch after which a trial ends, if ASHA finds it among the best third with the chance of any other."""
        for k, rung in enumerate(self.work.rungs):
            if rung <= epoch:
                continue
            reached[rung] = reached.get(rung, 0) + 1
            goes_on = max(1, reached[rung] // REDUCTION) / reached[rung]
            goes_on += (1 - goes_on) * random.ties
            if number != BASELINE and random.chance(number, k) > goes_on:
                return rung
        return self.work.epochs

    @cached_property
    def _draws(self) -> dict[int, _Draws]:
        return {}


MOST_TIES = 0.3
"""The largest share of trials that go on beside the best third, because they have the same balanced accuracy."""

OTHERS = 4
"""How many trials, beside the known ones, may be the winner with the same chance as each of these."""

WRONG = (0.1, 0.6)
"""The range of the share of test images that a model gets wrong."""


class _Draws:
    """The random numbers of one round, the same each time: those of a trial do not depend on the number of trials."""

    def __init__(self, forecast: Forecast, round_: int) -> None:
        self._forecast, work = forecast, forecast.work
        random = np.random.default_rng((12, round_))
        self.error = np.random.default_rng((13, round_)).standard_normal()
        table = random.random((min(work.trials, MOST_OF_ROUND) + 2, 2 + len(work.rungs))).tolist()
        (ties, share), (self.luck, chosen) = (row[:2] for row in table[:2])
        self.ties, self.share_wrong = MOST_TIES * ties, WRONG[0] + share * (WRONG[1] - WRONG[0])
        self._table: list[list[float]] = table[2:]
        self._known = forecast.known or forecast.space.fixed_trials
        self._slot_s: dict[int, float] = {}
        first = int(chosen * (len(self._known) + OTHERS))
        self.winner = self._known[first] if first < len(self._known) else self._drawn(table[0])

    def chance(self, number: int, rung: int) -> float:
        """A number of 0 to 1 that decides whether a trial goes on at a rung."""
        return self._table[number % len(self._table)][2 + rung]

    def slot_s(self, number: int) -> float:
        """Seconds that a slot takes for an epoch of a trial, which is known or drawn from the space."""
        if number not in self._slot_s:
            known = self._known
            this = known[number] if number < len(known) else self._drawn(self._table[number % len(self._table)])
            self._slot_s[number] = self._forecast._slot_s(this)
        return self._slot_s[number]

    def _drawn(self, row: list[float]) -> Hyperparameters:
        space = self._forecast.space
        values: dict[str, Any] = {}
        for name, share in zip(("truncation_depth", "frozen_share"), row, strict=False):
            if name in space.distributions:
                values[name] = _at(space.distributions[name], share)
        return space.hyperparameters(values)


def _last_end(busy: list[float], jobs: Sequence[float]) -> float:
    """When the last of these jobs ends, which slots take in turn; 0 without jobs.

    Args:
        busy: when each slot takes its first one.
        jobs: the seconds of each.
    """
    return max([heapq.heapreplace(busy, busy[0] + seconds) + seconds for seconds in jobs], default=0.0)


def as_range(low: float, high: float) -> str:
    """A range of seconds as text: "40 to 55 s", "3.1 to 4.5 min", "12 to 13 h", "at most 5 s"."""
    unit, name = _unit(high := max(high, 1.0))
    least, most = (f"{end / unit:.{int(unit > 1 and high < 10 * unit)}f}" for end in (low, high))
    if float(least) == 0:
        return f"at most {most} {name}"
    return f"{least} to {most} {name}" if least != most else f"about {most} {name}"


def as_time(seconds: float) -> str:
    """Seconds as text: "40 s", "3.1 min", "2.2 h"."""
    unit, name = _unit(seconds)
    return f"{seconds / unit:.{int(unit > 1)}f} {name}"


def _unit(seconds: float) -> tuple[int, str]:
    return next((size, name) for size, name in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * size or size == 1)


def _at(distribution: BaseDistribution, share: float) -> Any:
    """The value of a parameter below which this share of a distribution is."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return choices[int(share * len(choices))]
        case IntDistribution(low=low, high=high, log=False):
            return low + int(share * (high - low + 1))
        case IntDistribution(low=low, high=high):
            return min(high, int(low * ((high + 1) / low) ** share))
        case FloatDistribution(low=low, high=high, log=log):
            return float(low * (high / low) ** share) if log else low + share * (high - low)
    raise TypeError(f"{distribution!r}: a search space has none of these")
