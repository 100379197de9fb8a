"""Trials that are trained again outside the study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from trials import SHALLOW

from lungct_tune import replay
from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder, TrialRecord
from lungct_tune.tuning import rerun
from lungct_tune.tuning.rerun import follow_trial

if TYPE_CHECKING:
    pass

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


DIVERGED = TrialRecord(3, SHALLOW, tuple(epoch(number) for number in (1, 2, 3)), Outcome.DIVERGED)


@pytest.mark.parametrize("steps", [[3], [2, 1], [3, 0]])
def test_a_trial_that_diverges_again_after_the_recorded_epochs_gives_the_same_figures(
    steps: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replayed(steps, monkeypatch)
    assert "the same figures in all 3 epochs" in capsys.readouterr().out


def test_a_trial_that_diverges_in_an_earlier_epoch_than_recorded_cannot_be_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(replay.NotReplayable, match="trial 3 failed this time: loss nan"):
        replayed([1, 1], monkeypatch)


def replayed(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Replays DIVERGED in steps of so many epochs; the training diverges in the last of them, after these epochs."""
    first = [1 + sum(steps[:k]) for k in range(len(steps))]
    epochs = [tuple(epoch(start + k) for k in range(count)) for start, count in zip(first, steps, strict=True)]
    reports = [EpochReport(Outcome.RUNNING, done) for done in epochs[:-1]]
    reports.append(EpochReport(Outcome.DIVERGED, epochs[-1], reason="loss nan"))

    def replay_trial(*_: object) -> tuple[EpochReport, dict[str, Any]]:
        return follow_trial(lambda order: reports.pop(0), ORDER, len(DIVERGED.history)), {}

    monkeypatch.setattr(rerun, "replay_trial", replay_trial)
    plan: Any = type("Plan", (), {"experiment": type("Experiment", (), {"name": "one"})})
    nothing: Any = None
    return replay.replay(plan, nothing, None, DIVERGED, Console())
