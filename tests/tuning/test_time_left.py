"""The time left of a search: counted in epochs, with what follows the search, and better from trial to trial."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import optuna
import pytest
from rich.console import Console
from trials import record, workload

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.config.search_space import parse_space
from lungct_tune.experiment.forecast import BEGINNING, BUNDLE_S, Forecast, Workload
from lungct_tune.training.pace import Pace
from lungct_tune.tuning.time_left import TIMES_PLAYED, TimeLeft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lungct_tune.experiment.trial import TrialRecord

EPOCH_S = 2.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def estimate(clock: Clock, earlier: Sequence[TrialRecord] = (), retrainings: int = 1) -> TimeLeft:
    return TimeLeft(workload(12, 9, (1, 3), compares=retrainings > 1), earlier, now=clock)


def train(left: TimeLeft, clock: Clock, number: int, epochs: int) -> None:
    """A trial of so many epochs, to its end."""
    for epoch in range(1, epochs + 1):
        clock.now += EPOCH_S
        left.add(number, PUBLISHED, epoch, [EPOCH_S])
    left.end(record(number, epochs))


def test_without_a_forecast_the_end_is_foreseen_from_the_first_epoch_on() -> None:
    clock = Clock()
    left = estimate(clock)
    assert left.seconds is None and "after the first epoch" in str(left)
    lengths = [9, 1, 3, 1, 1, 9, 1, 1, 3, 1, 1, 1]
    end = clock.now + (sum(lengths) + 9) * EPOCH_S + BUNDLE_S
    latest, shares = [], []
    for number, epochs in enumerate(lengths):
        train(left, clock, number, epochs)
        assert left.seconds is not None
        low, high = left.seconds
        assert clock.now + low <= end + EPOCH_S and end <= clock.now + high
        latest.append(clock.now + high)
        shares.append(left.share)
    assert latest == sorted(latest, reverse=True) and shares == sorted(shares)


def test_without_a_forecast_the_retrainings_and_the_report_are_left_after_the_last_trial() -> None:
    clock = Clock()
    left = estimate(clock, retrainings=2)
    for number in range(12):
        train(left, clock, number, 9)
    left.search_ended()
    ranges = [left.seconds]
    left.retrain({"winner": PUBLISHED, "published": PUBLISHED})
    clock.now += 9 * EPOCH_S
    left.retrained({"published": 0})
    ranges.append(left.seconds)
    left.report()
    ranges.append(left.seconds)
    for found, epochs in zip(ranges, (18, 9, 0), strict=True):
        expected = epochs * EPOCH_S + BUNDLE_S
        assert found is not None and found[0] <= expected + EPOCH_S and expected <= found[1] < 2 * expected


def test_a_resumed_search_knows_at_once_what_earlier_trials_took() -> None:
    few = estimate(Clock(), [record(number, 3) for number in range(1, 6)])
    many = estimate(Clock(), [record(number, 3) for number in range(1, 11)])
    assert few.seconds is not None and many.seconds is not None
    assert many.seconds < few.seconds and many.share > few.share > 0


def test_a_trial_that_lost_its_workers_reaches_a_rung_once() -> None:
    left = estimate(Clock())
    for epoch in (4, 2, 5):
        left.add(1, PUBLISHED, epoch, [EPOCH_S])
    left.add(2, PUBLISHED, 2, [EPOCH_S])
    assert left._progress.reached == {1: 2, 3: 1}


def foreseen(clock: Clock, trials: int = 8) -> tuple[TimeLeft, Forecast]:
    space = parse_space("truncation_depth: {low: 20, high: 20}", "space")
    pace = Pace("CPU", 2.0, 0.1, 16, (20,), (0.5,), (0.01,))
    work = Workload(trials, 9, (3,), 1, 64, 10, 74, 20, 16, compares=True)
    forecast = Forecast(work, space, pace)
    return TimeLeft(work, (), forecast, clock), forecast


def test_a_forecast_is_there_before_the_first_epoch_and_the_latest_end_is_never_put_off() -> None:
    """The trials and the retraining take just what the forecast has for an epoch, and most are stopped at the rung."""
    clock = Clock()
    left, forecast = foreseen(clock)
    assert left.seconds == pytest.approx(forecast.left(BEGINNING, TIMES_PLAYED))
    epoch_s, latest = forecast.epoch_s(PUBLISHED), []
    clock.now += forecast.start_s
    for number, epochs in enumerate([9, 3, 9, 3, 3, 3, 3, 3]):
        for epoch in range(1, epochs + 1):
            clock.now += epoch_s
            left.add(number, PUBLISHED, epoch, [epoch_s])
            assert left.seconds is not None
            latest.append(clock.now + left.seconds[1])
        left.end(record(number, epochs))
    left.search_ended()
    left.retrain({"winner": PUBLISHED})
    for epoch in range(1, 10):
        clock.now += forecast.retraining_s(PUBLISHED, 1) - forecast.retraining_s(PUBLISHED, 0)
        left.retrained({"winner": epoch})
        assert left.seconds is not None
        latest.append(clock.now + left.seconds[1])
    left.report()
    assert left.seconds is not None
    latest.append(clock.now + left.seconds[1])
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(latest))
    assert left.seconds[1] < 30


def test_retrainings_in_two_slots_are_left_together_and_their_epochs_are_counted_together() -> None:
    clock = Clock()
    left = TimeLeft(
        workload(12, 9, (1, 3), slots=2, compares=True), [record(number, 9) for number in range(12)], now=clock
    )
    left.search_ended()
    left.retrain({"winner": PUBLISHED, "published": PUBLISHED})
    for epoch in (3, 8):
        left.retrained({"winner": epoch, "published": 3})
        clock.now += 60  # a new forecast is not made at every call
        expected = 6 * EPOCH_S + BUNDLE_S
        assert left.seconds is not None
        assert left.seconds[0] <= expected + EPOCH_S and expected <= left.seconds[1] < 2 * expected
    left.retrained({"published": 3})
    line = Console(width=80)
    with line.capture() as printed:
        line.print(left.retraining_bar())
    assert "epoch 12 of 18" in printed.get()


def test_slower_epochs_than_foreseen_put_the_end_off() -> None:
    clock = Clock()
    left, forecast = foreseen(clock)
    first, epoch_s = left.seconds, 4 * forecast.epoch_s(PUBLISHED)
    for epoch in range(1, 10):
        clock.now += epoch_s
        left.add(0, PUBLISHED, epoch, [epoch_s])
    left.end(record(0, 9))
    clock.now += 60  # a new forecast is not made at every call
    assert first is not None and left.seconds is not None and left.seconds[0] > first[1]


def test_the_retraining_may_start_beside_the_last_trial_or_shortly_before_the_end() -> None:
    """But not while slots of the search start, which need the room."""
    from lungct_tune.tuning.final_slots import SOON_S, nears_end

    study, clock, work = optuna.create_study(), Clock(), workload(3, 9, (3,))
    left = TimeLeft(work, (), now=clock)
    first, second = study.ask(), study.ask()
    assert not nears_end(study, 3, 2, left), "no epoch has been trained"
    left.add(first.number, PUBLISHED, 1, [4 * SOON_S])
    assert not nears_end(study, 3, 2, left), "the search takes much longer"
    assert not nears_end(study, 2, 2, left), "both slots have a trial"
    study.tell(first, 0.5)
    assert nears_end(study, 2, 2, left), "one slot has no more trials"
    quick = TimeLeft(work, (), now=clock)
    quick.add(second.number, PUBLISHED, 8, [0.1])
    assert quick.seconds is not None and quick.seconds[1] < SOON_S
    assert nears_end(study, 3, 2, quick) and not nears_end(study, 4, 3, quick), "the third slot has no trial yet"
