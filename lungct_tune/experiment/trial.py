"""A trial as it travels: the order that workers train by, what they report of it, and the record that remains.

Plain dataclasses: worker processes import this, and the study, Ray and the report share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any, Self

from lungct_tune.config.hyperparameters import Hyperparameters

BASELINE = 0
"""The number of the first trial of every study: the published configuration."""


class Outcome(Enum):
    """What became of a trial. The values are what tables and figures call it, and what the study keeps."""

    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped early"
    DIVERGED = "diverged"
    FAILED = "failed"
    REFUSED = "refused"
    """Of reports only: a node cannot use the search's storage. The trial stays as it is, and the search ends."""


@dataclass(frozen=True)
class TrialOrder:
    """What to train: all that a trial's figures follow from, beside the data."""

    number: int
    seed: int
    hyperparameters: Hyperparameters

    def as_dict(self) -> dict[str, Any]:
        """As Ray Tune's configuration of a trial and the states on storage have it."""
        return {"number": self.number, "seed": self.seed, "configuration": self.hyperparameters.as_dict()}

    @classmethod
    def from_dict(cls, order: Mapping[str, Any]) -> Self:
        return cls(order["number"], order["seed"], Hyperparameters(**order["configuration"]))


@dataclass(frozen=True)
class EpochFigures:
    """What a trial has shown after an epoch: means over its folds, where it has several."""

    epoch: int
    """From 1."""
    balanced_accuracy: float
    accuracy: float
    log_loss: float
    """Negative log-likelihood, every class weighted alike."""
    train_loss: float
    train_s: float
    valid_s: float
    at: float | None = None
    """When it ended, in seconds since 1970."""
    slot: int | None = None
    """Which slot ran it; None where it was run before an interruption and reported after it."""
    balanced_accuracy_sd: float | None = None
    """Standard deviation over the folds (n - 1)."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: by balanced accuracy, ties by the lower negative log-likelihood."""
        return self.balanced_accuracy, -self.log_loss

    @property
    def seconds(self) -> float:
        """In training and validation."""
        return self.train_s + self.valid_s

    def as_dict(self) -> dict[str, Any]:
        """As the study and the states on storage keep it: what is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def best_epoch(epochs: Iterable[EpochFigures]) -> EpochFigures | None:
    """The epoch that ranks highest, the first of equals; None where there is none."""
    return max(epochs, key=lambda figures: figures.rank, default=None)


@dataclass(frozen=True)
class EpochCost:
    """What an epoch took beside its seconds, on the first worker."""

    images: int
    """Trained on, by all workers."""
    checkpoint_bytes: int
    checkpoint_s: float


@dataclass(frozen=True)
class EpochReport:
    """A slot's answer to an order: where the trial stands."""

    outcome: Outcome
    epochs: tuple[EpochFigures, ...] = ()
    """Those that this slot has not reported before, oldest first: the new one, and after an interruption those before
    it."""
    cost: EpochCost | None = None
    """Of the new epoch; None where none was trained."""
    reason: str = ""
    """Of an outcome that is none to wish for."""

    @property
    def is_last(self) -> bool:
        """Whether the trial has ended with it."""
        return self.outcome not in (Outcome.RUNNING, Outcome.REFUSED)

    def of_slot(self, slot: int) -> EpochReport:
        """The same, its new epoch noted as run by a slot."""
        *before, last = self.epochs or (None,)
        return self if last is None else replace(self, epochs=(*before, replace(last, slot=slot)))

    def __str__(self) -> str:
        """What Ray Tune's own log files show of it."""
        return self.outcome.value


@dataclass(frozen=True)
class TrialRecord:
    """What the study has of a trial that has begun."""

    number: int
    hyperparameters: Hyperparameters
    history: tuple[EpochFigures, ...] = ()
    outcome: Outcome = Outcome.RUNNING
    ended: str = Outcome.RUNNING.value
    """How it ended and why, in words: "stopped early after epoch 3"."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, workers and resources that it was trained with."""
    started: datetime | None = None
    completed: datetime | None = None

    @property
    def is_finished(self) -> bool:
        return self.outcome is not Outcome.RUNNING

    @cached_property
    def best(self) -> EpochFigures | None:
        """Its best epoch; None where no epoch ended."""
        return best_epoch(self.history)

    @property
    def seconds(self) -> float:
        """In training and validation."""
        return sum(figures.seconds for figures in self.history)

    def row(self) -> dict[str, Any]:
        """A line of trials.csv: how it ended, hyperparameters, the best epoch's figures, seconds."""
        best = {} if self.best is None else self.best.as_dict()
        kept = ("epoch", "balanced_accuracy", "accuracy", "log_loss")
        spread = ("balanced_accuracy_sd",) if "balanced_accuracy_sd" in best else ()
        return (
            {"trial": self.number, "state": STATES[self.outcome], "ended": self.ended}
            | self.hyperparameters.as_dict()
            | {"frozen_depth": self.hyperparameters.frozen_depth, "epochs": len(self.history)}
            | {f"best_{name}": best.get(name) for name in (*kept, *spread)}
            | {"training_s": self.seconds}
        )


STATES = {
    Outcome.RUNNING: "RUNNING",
    Outcome.COMPLETED: "COMPLETE",
    Outcome.STOPPED: "PRUNED",
    Outcome.DIVERGED: "COMPLETE",
    Outcome.FAILED: "FAIL",
}
"""Optuna's state of a trial by its outcome. One that diverged is complete with the worst score, so that TPE learns from
it to stay away; of those that fail TPE learns nothing."""


def best_trial(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """Of the trials that ran to their end without diverging, the one with the best epoch; the first of equals.

    One that was stopped early may have shown a better epoch, but in the middle of its schedule, at a high learning
    rate, where neighbouring epochs differ by luck.
    """
    completed = [(trial.best.rank, trial) for trial in trials if trial.outcome is Outcome.COMPLETED and trial.best]
    return max(completed, key=lambda pair: pair[0], default=(None, None))[1]
