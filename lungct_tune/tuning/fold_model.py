"""The model that a trial trains on one fold: an epoch of training, then validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from lungct_tune.experiment.trial import EpochFigures, TrialOrder
from lungct_tune.training.objective import validation_figures
from lungct_tune.tuning.shared_data import SharedDataset

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fold:
    """The images that a model is trained and evaluated on, as rows of the data set."""

    train_rows: np.ndarray
    valid_rows: np.ndarray


class FoldModel:
    """A fold's model. All workers that train it together create and call theirs at the same time."""

    def __init__(
        self, dataset: SharedDataset, fold: Fold, order: TrialOrder, device: torch.device, each_alone: bool
    ) -> None:
        self._valid_positions = dataset.positions(fold.valid_rows)
        self._labels_N = dataset.labels_of(fold.valid_rows)
        self.trainer = dataset.trainer(order.hyperparameters, fold.train_rows, order.seed, device, each_alone)
        self.images = self.trainer.steps * self.trainer.share * self.trainer.world
        """Training images of an epoch."""
        self._probabilities_NC: np.ndarray | None = None

    def train_and_validate(self, *, rough: bool = False) -> EpochFigures:
        """Trains an epoch; returns its figures.

        Args:
            rough: whether the figures of validation decide nothing, see `Trainer.probabilities`.

        Raises:
            NotFiniteLoss: a loss, a gradient or a prediction is not finite.
        """
        from lungct_tune.training.trainer import NotFiniteLoss

        began = time.perf_counter()
        loss = self.trainer.train_epoch()
        trained = time.perf_counter()
        self._probabilities_NC = self.trainer.probabilities(self._valid_positions, rough=rough)
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

    def predictions(self) -> np.ndarray:
        """Probabilities (N, C) for the fold's validation images after the last epoch, in the order of its rows."""
        if self._probabilities_NC is None:  # the last epoch was trained before an interruption
            self._probabilities_NC = self.trainer.probabilities(self._valid_positions)
        return self._probabilities_NC


def mean_figures(by_worker: Sequence[dict[int, EpochFigures]], slot: int | None) -> EpochFigures:
    """The mean figures of the folds of an epoch, their standard deviation, and the seconds of the slowest worker."""
    folds = [figures for _, figures in sorted(chain(*(worker.items() for worker in by_worker)))]
    scores = [figures.balanced_accuracy for figures in folds]

    def longest(seconds: str) -> float:
        return max(sum(float(getattr(figures, seconds)) for figures in worker.values()) for worker in by_worker)

    return EpochFigures(
        epoch=folds[0].epoch,
        balanced_accuracy=float(np.mean(scores)),
        accuracy=float(np.mean([figures.accuracy for figures in folds])),
        log_loss=float(np.mean([figures.log_loss for figures in folds])),
        train_loss=float(np.mean([figures.train_loss for figures in folds])),
        train_s=longest("train_s"),
        valid_s=longest("valid_s"),
        at=max((figures.at for figures in folds if figures.at is not None), default=None),
        slot=slot,
        balanced_accuracy_sd=float(np.std(scores, ddof=1)) if len(folds) > 1 else None,
    )
