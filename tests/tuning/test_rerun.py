"""Trials that are trained again outside the study."""

from __future__ import annotations

from typing import Any

import pytest

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.tuning.rerun import follow_trial

ORDER = TrialOrder(1, 0, Hyperparameters())


def epoch(number: int) -> EpochFigures:
    return EpochFigures(number, 0.5, 0.5, 1.0, 1.0, 1.0, 0.1)


class Slot:
    """A slot whose steps have several epochs.

    It loses its workers once: those that take over report every epoch again, as `TrialRunner` does.
    """

    def __init__(self, epochs: int, lost_after: int, step: int = 1) -> None:
        self._epochs, self._lost_after, self._step, self._done = epochs, lost_after, step, 0

    def run(self, order: TrialOrder) -> EpochReport:
        first = 1 if self._done == self._lost_after else self._done + 1
        self._done = min(self._done + self._step, self._epochs)
        outcome = Outcome.COMPLETED if self._done == self._epochs else Outcome.RUNNING
        return EpochReport(outcome, tuple(epoch(number) for number in range(first, self._done + 1)))


@pytest.mark.parametrize(("lost_after", "step"), [(0, 1), (3, 1), (5, 1), (2, 2), (4, 4)])
def test_epochs_that_are_reported_twice_count_once(lost_after: int, step: int) -> None:
    slot: Any = Slot(epochs=6, lost_after=lost_after, step=step)
    report = follow_trial(slot.run, ORDER, epochs=6)
    assert report.outcome is Outcome.COMPLETED
    assert [figures.epoch for figures in report.epochs] == [1, 2, 3, 4, 5, 6]


def test_a_trial_is_followed_as_many_epochs_as_asked() -> None:
    slot: Any = Slot(epochs=6, lost_after=0, step=3)
    assert len(follow_trial(slot.run, ORDER, epochs=2).epochs) == 2
