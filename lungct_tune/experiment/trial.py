"""The data of a trial: the order that workers get, the report that they return, and the record in the study.

These are plain dataclasses, because worker processes import this module. The study, Ray and the report share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from lungct_tune.config.hyperparameters import Hyperparameters

BASELINE = 0
"""The number of the first trial of every study: the published configuration."""

KEPT_TRIALS = 20
"""So many of the best completed trials keep their weights, and the published configuration."""


class Outcome(Enum):
    """The outcome of a trial. Tables, figures and the study use the values."""

    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped early"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"
    REFUSED = "refused"
    """Only in reports: a node cannot use the search's storage. The trial keeps its state, and the search ends."""


UNUSABLE = (Outcome.DIVERGED, Outcome.OUT_OF_MEMORY)
"""The outcomes of trials whose hyperparameters give no usable model."""

UNSUCCESSFUL = (*UNUSABLE, Outcome.FAILED)
"""The outcomes of trials that ended without a usable model. Those that failed may have lost their workers by chance."""


@dataclass(frozen=True)
class TrialOrder:
    """What to train. A trial's figures depend on this and on the data."""

    number: int
    seed: int
    hyperparameters: Hyperparameters
    weights_from: tuple[float, float] | None = None
    """The lowest `EpochFigures.rank` with which its weights are kept; None if they always are."""

    @property
    def what(self) -> str:
        """Its name for the user."""
        return f"trial {self.number}"

    @property
    def identity(self) -> dict[str, Any]:
        """What its figures depend on. A state on storage belongs to a trial if their identities are equal."""
        return {"number": self.number, "seed": self.seed, "configuration": self.hyperparameters.as_dict()}


@dataclass(frozen=True)
class EpochFigures:
    """The figures of a trial after an epoch. With several folds they are means over the folds."""

    epoch: int
    """From 1."""
    balanced_accuracy: float
    accuracy: float
    log_loss: float
    """Negative log-likelihood, with equal weight for every class."""
    train_loss: float
    train_s: float
    valid_s: float
    at: float | None = None
    """The time when it ended, in seconds since 1970."""
    slot: int | None = None
    """The slot that ran it; None if that is not known."""
    balanced_accuracy_sd: float | None = None
    """Standard deviation over the folds (n - 1)."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: the higher balanced accuracy, then the lower negative log-likelihood."""
        return self.balanced_accuracy, -self.log_loss

    @property
    def seconds(self) -> float:
        """Seconds of training and validation."""
        return self.train_s + self.valid_s

    def as_dict(self) -> dict[str, Any]:
        """The form of it in the study and in the states on storage, without the fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def curves(self) -> dict[str, float]:
        """What is drawn over the epochs: all but when it ended, and where."""
        return {name: value for name, value in self.as_dict().items() if name not in ("at", "slot")}


@dataclass(frozen=True)
class EpochCost:
    """The cost of a step in addition to the seconds of its epochs, as the first worker measures it."""

    epochs: int
    """How many epochs were trained in the step."""
    images: int
    """Training images of an epoch, of all workers."""
    checkpoint_bytes: int
    """What has been written during the step: states, and the files of a completed trial."""
    checkpoint_s: float
    """How long training waited for that."""


@dataclass(frozen=True)
class EpochReport:
    """A slot's answer to an order: the state of the trial."""

    outcome: Outcome
    epochs: tuple[EpochFigures, ...] = ()
    """The epochs that the workers have not reported yet, oldest first: the new ones, and after an interruption those
    before it. An epoch that was trained again replaces the earlier one."""
    cost: EpochCost | None = None
    """Of the step; None if none was run."""
    reason: str = ""
    """Why the trial diverged, ran out of memory, failed or was refused."""

    @property
    def trained(self) -> tuple[EpochFigures, ...]:
        """The epochs that were trained in the step, without those that were trained before an interruption."""
        return self.epochs[len(self.epochs) - self.cost.epochs :] if self.cost else ()

    @property
    def is_last(self) -> bool:
        """Whether the trial has ended with this report."""
        return self.outcome not in (Outcome.RUNNING, Outcome.REFUSED)


@dataclass(frozen=True)
class TrialRecord:
    """The study's record of a trial that has started."""

    number: int
    hyperparameters: Hyperparameters
    history: tuple[EpochFigures, ...] = ()
    outcome: Outcome = Outcome.RUNNING
    ended: str = Outcome.RUNNING.value
    """How it ended and why, as text: "stopped early after epoch 3"."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The versions, workers and resources that it was trained with."""
    started: datetime | None = None
    completed: datetime | None = None

    @property
    def is_finished(self) -> bool:
        return self.outcome is not Outcome.RUNNING

    @property
    def last(self) -> EpochFigures | None:
        """The figures after its last epoch, by which it is judged; None if no epoch has ended.

        An earlier epoch may have had better ones by chance, most likely on a small validation split.
        """
        return self.history[-1] if self.history else None

    @property
    def seconds(self) -> float:
        """Seconds of training and validation."""
        return sum(figures.seconds for figures in self.history)

    def row(self) -> dict[str, Any]:
        """Its row of trials.csv: how it ended, hyperparameters, the last epoch's figures, seconds."""
        last = {} if self.last is None else self.last.as_dict()
        kept = ("balanced_accuracy", "accuracy", "log_loss")
        spread = ("balanced_accuracy_sd",) if "balanced_accuracy_sd" in last else ()
        return (
            {"trial": self.number, "state": STATES[self.outcome], "ended": self.ended}
            | self.hyperparameters.resolved.as_dict()
            | {"frozen_depth": self.hyperparameters.frozen_depth, "epochs": len(self.history)}
            | {name: last.get(name) for name in (*kept, *spread)}
            | {"training_s": self.seconds}
        )


STATES = {
    Outcome.RUNNING: "RUNNING",
    Outcome.COMPLETED: "COMPLETE",
    Outcome.STOPPED: "PRUNED",
    Outcome.DIVERGED: "COMPLETE",
    Outcome.OUT_OF_MEMORY: "COMPLETE",
    Outcome.FAILED: "FAIL",
}
"""Optuna's state of a trial by its outcome. A trial that diverged or ran out of memory is complete with the lowest
score, so that TPE avoids such configurations. TPE ignores trials that failed."""


def best_trial(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The completed trial that ranks highest, the first of equals; None if no trial has completed.

    A trial that was stopped early does not count, even if its last epoch was better. It ended at a high learning rate,
    in the middle of its schedule.
    """
    completed = [(trial.last.rank, trial) for trial in trials if trial.outcome is Outcome.COMPLETED and trial.last]
    return max(completed, key=lambda pair: pair[0], default=(None, None))[1]
