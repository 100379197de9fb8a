"""The time left of a search: counted in epochs, with what follows the search, and better from trial to trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.experiment.trial import EpochFigures, Outcome, TrialRecord
from lungct_tune.tuning.time_left import REPORT_S, TimeLeft, as_range

if TYPE_CHECKING:
    from collections.abc import Sequence

EPOCH_S = 2.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(number: int, epochs: int, outcome: Outcome = Outcome.STOPPED) -> TrialRecord:
    history = [EpochFigures(epoch, 0.5, 0.5, 1.0, 1.0, EPOCH_S, 0.0) for epoch in range(1, epochs + 1)]
    return TrialRecord(number, PUBLISHED, tuple(history), outcome, outcome.value)


def estimate(clock: Clock, earlier: Sequence[TrialRecord] = (), retrainings: int = 1) -> TimeLeft:
    return TimeLeft(12, (1, 3), 9, 1, retrainings, 0, earlier, clock)


def train(left: TimeLeft, clock: Clock, number: int, epochs: int) -> None:
    """A trial of so many epochs, to its end."""
    for epoch in range(1, epochs + 1):
        clock.now += EPOCH_S
        left.add(number, epoch, [EPOCH_S])
    left.end(record(number, epochs))


def test_the_end_is_in_the_range_and_the_latest_end_is_never_put_off() -> None:
    clock = Clock()
    left = estimate(clock)
    assert left.seconds is None and "after the first epoch" in str(left)
    lengths = [9, 1, 3, 1, 1, 9, 1, 1, 3, 1, 1, 1]
    end = clock.now + sum(lengths) * EPOCH_S + 9 * EPOCH_S + REPORT_S[0]
    latest, shares = [], []
    for number, epochs in enumerate(lengths):
        train(left, clock, number, epochs)
        assert left.seconds is not None
        low, high = left.seconds
        assert clock.now + low <= end + 1e-9 and end <= clock.now + high + 1e-9
        latest.append(clock.now + high)
        shares.append(left.share)
    assert latest == sorted(latest, reverse=True) and shares == sorted(shares)
    assert latest[-1] - end < (latest[0] - end) / 3


def test_after_the_last_trial_the_retraining_and_the_report_are_left() -> None:
    clock = Clock()
    left = estimate(clock, retrainings=2)
    for number in range(12):
        train(left, clock, number, 9)
    left.search_ended()
    assert left.seconds == pytest.approx((2 * 9 * EPOCH_S + REPORT_S[0], 2 * 9 * EPOCH_S + REPORT_S[1]))
    left.retrain(3, 9)
    clock.now += 9 * EPOCH_S
    left.retrained(9)
    low, high = left.seconds or (0, 0)
    assert low == pytest.approx(9 * EPOCH_S + REPORT_S[0])
    assert high >= low
    left.retrain(0, 9)
    left.report()
    assert left.seconds is not None and left.seconds[1] <= REPORT_S[1]


def test_a_resumed_search_knows_at_once_what_earlier_trials_took() -> None:
    earlier = [record(number, 3) for number in range(1, 6)]
    left = estimate(Clock(), earlier)
    assert left.seconds is not None and "left" in str(left)
    assert left.epochs_left[1] < 7 * 9 and left.share > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((12, 40), "12 to 40 s"),
        ((95, 300), "1 to 5 min"),
        ((10, 130), "at most 3 min"),
        ((3000, 6000), "50 to 100 min"),
        ((7000, 8000), "1 to 3 h"),
        ((5.2, 5.9), "5 to 6 s"),
    ],
)
def test_a_range_is_rounded_outwards(seconds: tuple[float, float], text: str) -> None:
    assert as_range(*seconds) == text.replace("50 to 100 min", "at most 2 h")
