"""A final retraining: a configuration on train and validation together, evaluated once on test."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.folder import Experiment
from lungct_tune.tuning.collectives import gather
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.trial_state import StateWriter, read_state

if TYPE_CHECKING:
    import torch

    from lungct_tune.config.settings import Settings
    from lungct_tune.experiment.trial import TrialRecord
    from lungct_tune.training.trainer import Trainer
    from lungct_tune.tuning.slot_plan import SlotPlan

STATE, WEIGHTS, PREDICTIONS = "last.pt", "model.safetensors", "test_probabilities.npy"
FEATURES = "features.npz"
"""The files of a retraining. The predictions are written last, so they say that it has ended."""

SAMPLE = 2000
"""The most training images whose features are kept. More would hardly change their distribution."""


@dataclass(frozen=True)
class RetrainOrder:
    """What the workers of a slot get to retrain a trial's hyperparameters on train and validation together.

    It takes as many epochs as the trial, which has run to its end. For an ensemble, an order has a fold, and its model
    is trained without that fold's images: with the trial's seed, so that it is the model that the trial had.
    """

    number: int
    """Of the trial."""
    hyperparameters: Hyperparameters
    seed: int
    test: SharedDataset
    """The images of test. No order of the search has them."""
    fold: int | None = None

    @property
    def what(self) -> str:
        """Its name for the user, different for each retraining of a search."""
        return f"the retraining of trial {self.number}" + ("" if self.fold is None else f" without fold {self.fold}")

    @property
    def folder(self) -> str:
        """Of its files, different for each retraining of a search."""
        without = "" if self.fold is None else f"_without_fold_{self.fold}"
        return f"final/trial_{self.number:04d}_{self.test.epochs:03d}_epochs{without}"

    def file(self, name: str) -> str:
        return f"{self.folder}/{name}"


def orders_of(settings: Settings, trial: TrialRecord, test: SharedDataset) -> list[RetrainOrder]:
    """What is retrained of a trial: one model, or for an ensemble one without each fold.

    Args:
        settings: of the search, as its plan has decided them.
        test: the images of test.
    """
    what = trial.number, trial.hyperparameters, settings.seed, test
    folds = range(settings.folds) if settings.ensemble and settings.folds else [None]
    return [RetrainOrder(*what, fold) for fold in folds]


def read_result(experiment: Experiment, order: RetrainOrder) -> RetrainedModel | None:
    """The model of a retraining; None if it has not ended, or, with a warning, if its files are damaged.

    A machine that is lost may leave such files.

    Raises:
        StorageError: its files cannot be read.
    """
    import safetensors.torch

    predictions = experiment.read(order.file(PREDICTIONS))  # the last to be written
    if predictions is None:
        return None
    weights, features = experiment.read(order.file(WEIGHTS)) or b"", experiment.read(order.file(FEATURES))
    try:
        safetensors.torch.load(weights)
        if features is not None:
            dict(np.load(io.BytesIO(features)))
        return RetrainedModel(weights, np.load(io.BytesIO(predictions)), features)
    except Exception:  # the libraries raise any kind
        where = f"{experiment.uri}/{order.folder}"
        logging.getLogger(__name__).warning("%s runs again: its files in %s are damaged", order.what, where)
        return None


def retrain(
    plan: SlotPlan,
    order: RetrainOrder,
    device: torch.device,
    must_save: Callable[[], bool] = lambda: False,
    warn: Callable[[str], None] = lambda sentence: None,
    note_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Trains to the last epoch, predicts the test images, and writes the files. All workers call it together.

    Args:
        plan: of the slot, with the images of train and validation.
        must_save: whether a state is to be saved as soon as possible, because this worker may be lost.
        warn: is called with a sentence if the storage refuses a state.
        note_epoch: is called with the number of each epoch that has ended.

    Raises:
        NotFiniteLoss: it has diverged.
    """
    import safetensors.torch

    experiment, dataset = plan.experiment, plan.dataset
    rows = dataset.rows if order.fold is None else plan.folds[order.fold].train_rows
    trainer = dataset.trainer(order.hyperparameters, rows, order.seed, device)
    if (state := read_state(experiment, order.file(STATE))) is not None:
        trainer.load_state_dict(state)
    writer, saved_at = StateWriter(experiment, lambda epoch: order.file(STATE)), time.monotonic()
    while trainer.epoch < trainer.epochs:
        trainer.train_epoch()
        if trainer.rank == 0:
            note_epoch(trainer.epoch)
        due = any(gather(must_save())) or time.monotonic() - saved_at >= plan.checkpoint_interval
        if trainer.rank == 0 and due and writer.is_idle and trainer.epoch < trainer.epochs:
            if (error := writer.take_error()) is not None:
                warn(f"the final retraining goes on, but its state is not saved: {error}")
            writer.start(trainer.epoch, trainer.state_dict())
            saved_at = time.monotonic()
    # the one place in the program that looks at the test split
    test_NHW = order.test.images_on(device)
    probabilities_NC = trainer.probabilities(range(len(test_NHW)), test_NHW)
    if trainer.rank == 0:
        predictions = io.BytesIO()
        np.save(predictions, probabilities_NC)
        experiment.write(order.file(WEIGHTS), safetensors.torch.save(trainer.model_state()))
        experiment.write(order.file(FEATURES), sample_features(trainer, dataset, rows, order.seed))
        experiment.write(order.file(PREDICTIONS), predictions.getbuffer())
    writer.wait()


def sample_features(trainer: Trainer, dataset: SharedDataset, train_rows: np.ndarray, seed: int) -> bytes:
    """The features of up to `SAMPLE` training images, as a .npz file of their rows (N,) and their features (N, D)."""
    from lungct_tune.models.features import pooled_features

    drawn = np.random.default_rng(seed).permutation(len(train_rows))[:SAMPLE]
    kept, rows = io.BytesIO(), train_rows[np.sort(drawn)]
    positions = dataset.positions(rows)
    features_ND = pooled_features(trainer.average.model, trainer.images_NHW, positions, trainer.normalisation)
    np.savez(kept, rows=rows, features=features_ND)
    return kept.getvalue()
