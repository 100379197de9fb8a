"""The configuration of a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lungct_tune.experiment.folder import Experiment
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.shared_data import SharedDataset


@dataclass(frozen=True)
class SlotPlan:
    """The configuration of a slot, the same for every slot of a search."""

    experiment: Experiment
    dataset: SharedDataset
    folds: tuple[Fold, ...]
    """One fold, or several: a trial's figures are then means over the folds."""
    workers: int
    resources_per_worker: dict[str, float]
    mailbox: Any
    """The actor of `opened_mailbox`, one for all slots of a job."""
    rungs: tuple[int, ...] = ()
    """The epochs after which early stopping decides about a trial."""
    checkpoint_interval: float = 30.0
    """Seconds of training between two saved states of a trial."""
    kind: str = ""
    """A word in the names of the slots, where a job has two kinds of them."""

    @property
    def slots(self) -> str:
        """How the names of the slots begin; numbers follow."""
        return " ".join(filter(None, [self.experiment.name, self.kind, "slot"]))
