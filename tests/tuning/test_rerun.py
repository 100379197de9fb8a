"""Trials that are trained again outside the study."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from trials import SHALLOW, slot_plan, workload

from lungct_tune import replay
from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.config.settings import Settings
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import SeedComparison
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder, TrialRecord
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning import rerun
from lungct_tune.tuning.rerun import SeedFailed, rerun_with_seeds
from lungct_tune.tuning.slot_actor import follow
from lungct_tune.tuning.time_left import TimeLeft
from lungct_tune.tuning.tuner import provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    report = follow(slot.run, ORDER, epochs=6)
    assert report.outcome is Outcome.COMPLETED
    assert [figures.epoch for figures in report.epochs] == [1, 2, 3, 4, 5, 6]


def test_a_trial_is_followed_as_many_epochs_as_asked() -> None:
    slot: Any = Slot(epochs=6, lost_after=0, step=3)
    assert len(follow(slot.run, ORDER, epochs=2).epochs) == 2


class Queue:
    """A queue with one slot, in this thread, that runs `step`."""

    step: Callable[[TrialOrder], EpochReport]

    def __init__(self, plan: object) -> None: ...

    def start(self, slots: int) -> None: ...

    def wait(self, futures: object) -> None: ...

    def end(self) -> None: ...

    def run(self, orders: Iterable[TrialOrder], note: Any, epochs: int) -> list[Future[EpochReport]]:
        futures = []
        for order in orders:
            futures.append(Future[EpochReport]())
            try:
                futures[-1].set_result(follow(type(self).step, order, note, epochs))
            except Exception as error:
                futures[-1].set_exception(error)
        return futures


class Seeds:
    """Trains a winner, trial 7, and the published configuration with the seeds 5 and 6, four epochs each."""

    def __init__(self, folder: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rerun, "SlotQueue", Queue)
        self.now = 0.0
        mailbox = SimpleNamespace(warn=SimpleNamespace(remote=print))
        self.plan = slot_plan(folder, phantoms, epochs=4, mailbox=mailbox)
        history = tuple(epoch(number) for number in range(1, 5))
        self.published = TrialRecord(0, PUBLISHED, history, Outcome.COMPLETED)
        self.winner = TrialRecord(7, SHALLOW, history, Outcome.COMPLETED)
        trials = [self.published, self.winner]
        self.left = TimeLeft(workload(2, 4, (2,), seeds=4), trials, now=lambda: self.now)
        self.left.search_ended()

    def run(self, step: Callable[[TrialOrder], EpochReport]) -> SeedComparison:
        Queue.step = staticmethod(step)
        return rerun_with_seeds(self.plan, self.winner, self.published, [5, 6], 1, self.left)


@pytest.fixture
def seeds(tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> Seeds:
    return Seeds(tmp_path, phantoms, monkeypatch)


def completed(order: TrialOrder) -> EpochReport:
    return EpochReport(Outcome.COMPLETED, tuple(epoch(number) for number in range(1, 5)))


def failed(order: TrialOrder) -> EpochReport:
    return EpochReport(Outcome.FAILED, reason="the workers ended: there was an error")


@pytest.mark.parametrize(("number", "seed", "trial"), [(2, 6, 7), (3, 5, 0)])
def test_a_training_with_another_seed_that_lost_its_workers_has_no_figure(
    seeds: Seeds, number: int, seed: int, trial: int
) -> None:
    said = rf"trial {trial} could not be trained with seed {seed}: .*an error.*\n.*--resume continues"
    with pytest.raises(SeedFailed, match=said):
        seeds.run(lambda order: (failed if order.number == number else completed)(order))


def test_a_seed_with_which_a_configuration_diverges_counts_with_the_lowest_score(seeds: Seeds) -> None:
    diverged = EpochReport(Outcome.DIVERGED, (epoch(1),), reason="loss nan in epoch 2")
    found = seeds.run(lambda order: diverged if order.number == 4 else completed(order))
    assert found.balanced_accuracy == [0.5, 0.5]
    assert found.published and found.published.balanced_accuracy == [0.5, 0.0]


def test_seeds_that_had_ended_before_an_interruption_are_not_trained_again(seeds: Seeds) -> None:
    diverged = EpochReport(Outcome.DIVERGED, (epoch(1),), reason="loss nan in epoch 2")
    with pytest.raises(SeedFailed):
        seeds.run(lambda order: {1: completed(order), 3: diverged}.get(order.number) or failed(order))
    trained = []

    def step(order: TrialOrder) -> EpochReport:
        trained.append(order.number)
        return completed(order)

    found = seeds.run(step)
    assert trained == [2, 4]
    assert found.balanced_accuracy == [0.5, 0.5]
    assert found.published and found.published.balanced_accuracy == [0.0, 0.5]
    assert seeds.run(step) == found and trained == [2, 4]
    seeds.winner = replace(seeds.winner, hyperparameters=replace(SHALLOW, dropout=0.25))
    seeds.run(step)
    assert trained == [2, 4, 1, 2]  # those of another winner are trained


@pytest.mark.parametrize("content", ["", '{"order": [', "[]", '{"order": 1, "epochs": 4}'])
def test_a_seed_whose_kept_figures_are_damaged_is_trained_again(
    seeds: Seeds, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Found: a search that was continued after the loss of its machine ended with an error of Python."""
    found = seeds.run(completed)
    (file,) = Path(seeds.plan.experiment.uri).glob("*-seeds/trials/0002/report.json")
    file.write_text(content)
    trained = []

    def step(order: TrialOrder) -> EpochReport:
        trained.append(order.number)
        return completed(order)

    assert seeds.run(step) == found and trained == [2]
    said = f"the training with seed 6 runs again: {file} is damaged"
    assert (said in caplog.text) == (content[:12] != '{"order": 1,')


def test_seeds_whose_figures_the_storage_refuses_count_all_the_same(
    seeds: Seeds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Experiment, "write", refuse)
    assert seeds.run(completed).balanced_accuracy == [0.5, 0.5]
    assert (
        "the training with seed 5 has ended, but its figures are not saved: the disk is full" in capsys.readouterr().out
    )


def test_the_time_left_falls_with_each_epoch_of_the_seeds(seeds: Seeds) -> None:
    ranges = []
    slots = {number: Slot(epochs=4, lost_after=0) for number in range(1, 5)}

    def step(order: TrialOrder) -> EpochReport:
        ranges.append(seeds.left.seconds or pytest.fail("no forecast"))
        seeds.now += 60  # a new forecast is not made at every call
        return slots[order.number].run(order)

    seeds.run(step)
    ranges.append(seeds.left.seconds or pytest.fail("no forecast"))
    assert len(ranges) == 17
    assert all(after < before for ends in zip(*ranges, strict=True) for before, after in pairwise(ends))
    seeds.left.report()
    assert ranges[-1] == pytest.approx(seeds.left.seconds)  # no training is left


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


@pytest.mark.parametrize(
    ("then", "said"), [("bfloat16", "precision bfloat16, now float32"), ("float32", ""), (None, "")]
)
def test_a_cpu_that_trains_in_another_precision_is_named(
    then: str | None, said: str, seeds: Seeds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lungct_tune.models.preprocessing.training_precision_for", lambda device: torch.float32)
    now = provenance(seeds.plan)
    noted = {name: value for name, value in now.items() if name != "precision"}  # all that earlier searches have noted
    replayed([3], monkeypatch, noted if then is None else noted | {"precision": then}, now)
    output = capsys.readouterr().out
    assert said in output and ("versions or resources differ" in output) == bool(said)


def test_two_replays_at_once_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: the second deleted what the first had saved, and both were in one mailbox."""
    plan: Any = type("Plan", (), {"experiment": Experiment.at(str(tmp_path), "one"), "settings": Settings()})
    boxes: list[str] = []

    def rerun_trials(slot: Any, folder: str, *_: Any, **__: Any) -> list[Any]:
        state = Experiment.at(plan.experiment.uri, folder)
        state.write("trials/0003/state-0001.pt", b"state")
        boxes.append(folder)
        if len(boxes) == 1:
            again()
            assert state.exists("trials/0003/state-0001.pt")
        return [None]

    def again() -> None:
        nothing: Any = None
        rerun.replay_trial(plan, nothing, None, DIVERGED, print)

    for name in ("make_slot_plan", "divide", "provenance", "opened_mailbox", "news_exchanged"):
        monkeypatch.setattr(rerun, name, lambda *_: nullcontext())
    monkeypatch.setattr(rerun, "cluster_nodes", list)
    monkeypatch.setattr(rerun, "rerun_trials", rerun_trials)
    (tmp_path / "one").mkdir()
    again()
    assert len(set(boxes)) == 2 and not list((tmp_path / "one").iterdir())


def replayed(steps: list[int], monkeypatch: pytest.MonkeyPatch, then: Any = None, now: Any = None) -> bool:
    """Replays DIVERGED in steps of so many epochs; the training diverges in the last of them, after these epochs.

    Args:
        then: the provenance of the recorded trial.
        now: that of the new training.
    """
    first = [1 + sum(steps[:k]) for k in range(len(steps))]
    epochs = [tuple(epoch(start + k) for k in range(count)) for start, count in zip(first, steps, strict=True)]
    reports = [EpochReport(Outcome.RUNNING, done) for done in epochs[:-1]]
    reports.append(EpochReport(Outcome.DIVERGED, epochs[-1], reason="loss nan"))

    def replay_trial(*_: object) -> tuple[EpochReport, dict[str, Any]]:
        return follow(lambda order: reports.pop(0), ORDER, epochs=len(DIVERGED.history)), now or {}

    monkeypatch.setattr(rerun, "replay_trial", replay_trial)
    plan: Any = type("Plan", (), {"experiment": type("Experiment", (), {"name": "one"})})
    nothing: Any = None
    return replay.replay(plan, nothing, None, replace(DIVERGED, provenance=then or {}), Console())
