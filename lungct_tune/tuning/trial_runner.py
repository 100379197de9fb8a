"""Runs a trial on the workers of a slot: trains it epoch by epoch, keeps its state, reports its figures.

Without folds all workers train one model together, each on its share of every batch. With folds every worker trains
models of its own, one for each fold, so that no gradients are exchanged. This works without Ray too: in one process, or
in any torch.distributed process group.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lungct_tune.experiment.folder import VALID, Experiment, state_file, trial_folder
from lungct_tune.experiment.trial import (
    EpochCost,
    EpochFigures,
    EpochReport,
    Outcome,
    TrialOrder,
    best_epoch,
)
from lungct_tune.training.objective import OBJECTIVE, validation_figures
from lungct_tune.tuning.shared_data import SharedDataset

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DIGEST_BYTES = 32
"""A state starts with the sha256 of its other bytes, because torch loads many damaged files without an error."""


@dataclass(frozen=True)
class Fold:
    """The images that a model is trained and evaluated on, as rows of the data set."""

    train_rows: np.ndarray
    valid_rows: np.ndarray


class TrialRunner:
    """A worker's part of one trial. All workers of a slot create and call theirs at the same time.

    A trial's figures are the means over its folds. Its best epoch is the one with the best means.

    Args:
        experiment: where the trial's state is written, and read from at the start.
        folds: one, or several for cross-validation.
        device: where this worker trains.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: SharedDataset,
        folds: Sequence[Fold],
        order: TrialOrder,
        device: torch.device,
    ) -> None:
        import torch.distributed as dist

        self.number = order.number
        self._experiment, self._epochs = experiment, dataset.epochs
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._each_alone = len(folds) > 1
        mine = range(self._rank, len(folds), self._world) if self._each_alone else [0]
        self._models = [
            _FoldModel(experiment, dataset, fold, folds[fold], order, device, alone=self._each_alone) for fold in mine
        ]
        for model in self._models:
            model.resume()
        epochs = list(chain(*self._of_all_workers([model.trainer.epoch for model in self._models])))
        self._epoch = min(epochs)
        if max(epochs) > self._epoch + 1:  # a fold's state was damaged: the others are of a later epoch
            self._epoch = 0
            for model in self._models:
                model.restart()
        self._in_order = np.argsort(np.concatenate([fold.valid_rows for fold in folds]))
        self._reported = 0

    def run_epoch(self) -> EpochReport:
        """Trains and validates an epoch, writes the trial's state, and returns the report for the study."""
        is_new = self._epoch < self._epochs
        self._epoch += is_new
        by_worker = self._of_all_workers([model.run_to(self._epoch) for model in self._models])
        results = sorted(chain(*by_worker), key=lambda result: result.fold)
        if errors := [result.diverged for result in results if result.diverged]:
            return EpochReport(Outcome.DIVERGED, reason=errors[0])
        history = [_figures_of_epoch(by_worker, epoch) for epoch in range(self._epoch)]
        cost = None
        if is_new:
            began = time.perf_counter()
            written = self._save(history, results)
            images = sum(result.images for result in results)
            cost = EpochCost(images, written, time.perf_counter() - began)
            self._of_all_workers(None)  # so that all have written their states before the first one answers
        new, self._reported = history[self._reported :], len(history)
        outcome = Outcome.COMPLETED if self._epoch >= self._epochs else Outcome.RUNNING
        return EpochReport(outcome, tuple(new), cost)

    def _of_all_workers(self, mine: T) -> list[T]:
        """The values of all workers, by rank. If they train one model together, all are equal, and one is returned."""
        if not self._each_alone or self._world == 1:
            return [mine]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self._world
        dist.all_gather_object(gathered, mine)
        return gathered

    def _save(self, history: Sequence[EpochFigures], results: Sequence[_FoldResult]) -> int:
        """Writes the files of the best epoch, then the states. After a crash between the two the epoch is repeated.

        Returns:
            How many bytes this worker wrote.
        """
        written = 0
        if self._rank == 0 and best_epoch(history) is history[-1]:
            written += self._save_best(history[-1], results)
        if self._rank == 0 or self._each_alone:
            written += sum(model.save() for model in self._models)
        return written

    def _save_best(self, figures: EpochFigures, results: Sequence[_FoldResult]) -> int:
        import safetensors.torch

        metadata = {"epoch": str(figures.epoch), OBJECTIVE: str(figures.balanced_accuracy)}
        weights = safetensors.torch.save(self._models[0].trainer.model_state(), metadata)
        self._experiment.write(f"{trial_folder(self.number)}/best.safetensors", weights)
        valid = io.BytesIO()
        np.save(valid, np.concatenate([result.probabilities_NC for result in results])[self._in_order])
        self._experiment.write(f"{trial_folder(self.number)}/{VALID}", valid.getbuffer())
        return len(weights) + valid.getbuffer().nbytes


@dataclass(frozen=True)
class _FoldResult:
    """The results of a fold's model after an epoch."""

    fold: int
    history: list[EpochFigures]
    probabilities_NC: np.ndarray
    """On the fold's validation images, in the order of its rows."""
    images: int
    """Training images of an epoch."""
    diverged: str


class _FoldModel:
    """The model of one fold, and its state on the storage."""

    def __init__(
        self,
        experiment: Experiment,
        dataset: SharedDataset,
        number: int,
        fold: Fold,
        order: TrialOrder,
        device: torch.device,
        *,
        alone: bool,
    ) -> None:
        self._experiment, self._dataset, self._number, self._fold = experiment, dataset, number, fold
        self._order, self._device, self._alone = order, device, alone
        self._valid_positions = dataset.positions(fold.valid_rows)
        self._labels_N = dataset.labels_of(fold.valid_rows)
        self.restart()

    def restart(self) -> None:
        """Starts with an untrained model."""
        order, rows = self._order, self._fold.train_rows
        self.trainer = self._dataset.trainer(order.hyperparameters, rows, order.seed, self._device, self._alone)
        self._history: list[EpochFigures] = []
        self._probabilities_NC = np.empty(0)

    def resume(self) -> None:
        """Continues from the state on the storage, if there is one of this order.

        A damaged state is ignored. A state may be damaged if it was read while a dying process was writing it.
        """
        import torch

        kept = self._experiment.read(state_file(self._order.number, self._number)) or b""
        digest, content = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
        if digest != hashlib.sha256(content).digest():
            return
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        if state["order"] == self._order.identity:  # else it is of a trial with the same number in another study
            self.trainer.load_state_dict(state["training"])
            self._history = [EpochFigures(**figures) for figures in state["history"]]

    def run_to(self, epoch: int) -> _FoldResult:
        """Brings the model to this epoch, unless it ended the epoch before an interruption; returns its results."""
        from lungct_tune.training.trainer import NotFiniteLoss

        diverged = ""
        try:
            if self.trainer.epoch < epoch:
                self._history.append(self._train_and_validate())
            elif not len(self._probabilities_NC):
                self._probabilities_NC = self.trainer.probabilities(self._valid_positions)
        except NotFiniteLoss as error:
            diverged = f"fold {self._number}: {error}" if self._alone else str(error)
        images = self.trainer.steps * self.trainer.share * self.trainer.world
        return _FoldResult(self._number, self._history, self._probabilities_NC, images, diverged)

    def _train_and_validate(self) -> EpochFigures:
        from lungct_tune.training.trainer import NotFiniteLoss

        began = time.perf_counter()
        loss = self.trainer.train_epoch()
        trained = time.perf_counter()
        self._probabilities_NC = self.trainer.probabilities(self._valid_positions)
        if not np.isfinite(self._probabilities_NC).all():
            raise NotFiniteLoss(f"predictions are not finite after epoch {self.trainer.epoch}")
        figures = validation_figures(self._labels_N, self._probabilities_NC)
        return EpochFigures(
            epoch=self.trainer.epoch,
            balanced_accuracy=figures["balanced_accuracy"],
            accuracy=figures["accuracy"],
            log_loss=figures["log_loss"],
            train_loss=loss,
            train_s=trained - began,
            valid_s=time.perf_counter() - trained,
            at=time.time(),
        )

    def save(self) -> int:
        """Writes the model's state, after its sha256; returns the number of bytes."""
        import torch

        history = [figures.as_dict() for figures in self._history]
        stream = io.BytesIO()
        state = {"order": self._order.identity, "training": self.trainer.state_dict(), "history": history}
        torch.save(state, stream)
        content = stream.getvalue()
        file = state_file(self._order.number, self._number)
        self._experiment.write(file, hashlib.sha256(content).digest() + content)
        return DIGEST_BYTES + len(content)


def _figures_of_epoch(by_worker: Sequence[Sequence[_FoldResult]], epoch: int) -> EpochFigures:
    """The mean figures of the folds, their standard deviation, and the seconds of the slowest worker."""
    folds = [result.history[epoch] for result in chain(*by_worker)]
    scores = [figures.balanced_accuracy for figures in folds]

    def longest(seconds: str) -> float:
        return max(sum(float(getattr(result.history[epoch], seconds)) for result in worker) for worker in by_worker)

    return EpochFigures(
        epoch=epoch + 1,
        balanced_accuracy=float(np.mean(scores)),
        accuracy=float(np.mean([figures.accuracy for figures in folds])),
        log_loss=float(np.mean([figures.log_loss for figures in folds])),
        train_loss=float(np.mean([figures.train_loss for figures in folds])),
        train_s=longest("train_s"),
        valid_s=longest("valid_s"),
        at=max((figures.at for figures in folds if figures.at is not None), default=None),
        balanced_accuracy_sd=float(np.std(scores, ddof=1)) if len(folds) > 1 else None,
    )
