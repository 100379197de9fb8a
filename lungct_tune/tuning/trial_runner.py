"""What the workers of a slot do with a trial: train it epoch by epoch, keep its state, say what it is worth.

Without folds all workers train one model together, each on its share of every batch. With folds every worker trains
models of its own, one a fold, and nothing has to be averaged between their steps.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.folder import VALID, Experiment, state_file, trial_folder
from lungct_tune.training.objective import OBJECTIVE, OBJECTIVE_SD, rank, validation_figures
from lungct_tune.tuning.shared_data import SharedDataset

T = TypeVar("T")


DIGEST_BYTES = 32
"""A state begins with the sha256 of the rest: torch would load much that is damaged without a word."""


@dataclass(frozen=True)
class Fold:
    """What a model is trained on, and what judges it: indices into the material's images."""

    train_indices: np.ndarray
    valid_indices: np.ndarray


class TrialRunner:
    """A worker's part of one trial. All workers of a slot make theirs, and call them, at the same time.

    A trial's figures are the means over its folds; its best epoch is that with the best means.

    Args:
        order: `{"number": int, "seed": int, "configuration": {...}}`.
    """

    def __init__(
        self, experiment: Experiment, material: SharedDataset, folds: Sequence[Fold], order: dict[str, Any]
    ) -> None:
        import torch.distributed as dist

        self.number = order["number"]
        self._experiment, self._epochs = experiment, material.epochs
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._each_alone = len(folds) > 1
        mine = range(self._rank, len(folds), self._world) if self._each_alone else [0]

        def models(go_on: bool) -> list[_FoldModel]:
            how = {"alone": self._each_alone, "go_on": go_on}
            return [_FoldModel(experiment, material, fold, folds[fold], order, **how) for fold in mine]

        self._models = models(go_on=True)
        epochs = list(chain(*self._of_all_workers([model.training.epoch for model in self._models])))
        self._epoch = min(epochs)
        if max(epochs) > self._epoch + 1:  # a fold's state was damaged: what the others say is of a later epoch
            self._models, self._epoch = models(go_on=False), 0
        self._in_order = np.argsort(np.concatenate([fold.valid_indices for fold in folds]))
        self._told = 0

    def run_epoch(self) -> dict[str, Any]:
        """Trains and validates an epoch, keeps the trial's state, and says what the study should know."""
        new = self._epoch < self._epochs
        self._epoch += new
        by_worker = self._of_all_workers([model.run_to(self._epoch) for model in self._models])
        outcomes = sorted(chain(*by_worker), key=lambda outcome: outcome.fold)
        if errors := [outcome.diverged for outcome in outcomes if outcome.diverged]:
            return {OBJECTIVE: 0.0, "diverged": errors[0], "done": True}
        history = [_figures_of_epoch(by_worker, epoch) for epoch in range(self._epoch)]
        cost: dict[str, float] = {}
        if new:
            best = max(history, key=rank) is history[-1]
            cost = {"images": sum(outcome.images for outcome in outcomes)} | self._keep(history, outcomes, best)
            self._of_all_workers(None)  # all have kept theirs when the first one answers
        *earlier, last = history[self._told :]
        self._told = len(history)
        # Tune's loggers count by its iteration, which would begin anew where an interrupted trial goes on
        done = self._epoch >= self._epochs
        return last | cost | {"training_iteration": last["epoch"], "earlier": earlier, "done": done}

    def _of_all_workers(self, mine: T) -> list[T]:
        """What each worker says, by rank. Workers that train one model together say the same: one of them speaks."""
        if not self._each_alone or self._world == 1:
            return [mine]
        import torch.distributed as dist

        said: list[Any] = [None] * self._world
        dist.all_gather_object(said, mine)
        return said

    def _keep(self, history: Sequence[dict[str, float]], outcomes: Sequence[_Outcome], best: bool) -> dict[str, float]:
        """What the best epoch left first, then the states that count it: a crash between the two repeats the epoch.

        Returns:
            What that took on the first worker, in bytes and seconds; nothing on others.
        """
        import safetensors.torch

        began, written = time.perf_counter(), 0
        if self._rank == 0 and best:
            last = history[-1]
            metadata = {"epoch": str(last["epoch"]), OBJECTIVE: str(last[OBJECTIVE])}
            weights = safetensors.torch.save(self._models[0].training.model_state(), metadata)
            self._experiment.write(f"{trial_folder(self.number)}/best.safetensors", weights)
            valid = io.BytesIO()
            np.save(valid, np.concatenate([outcome.probabilities_NC for outcome in outcomes])[self._in_order])
            self._experiment.write(f"{trial_folder(self.number)}/{VALID}", valid.getbuffer())
            written += len(weights) + valid.getbuffer().nbytes
        if self._rank == 0 or self._each_alone:
            written += sum(model.keep() for model in self._models)
        return {"checkpoint_bytes": written, "checkpoint_s": time.perf_counter() - began} if self._rank == 0 else {}


@dataclass(frozen=True)
class _Outcome:
    """What a fold's model shows after an epoch."""

    fold: int
    history: list[dict[str, float]]
    probabilities_NC: np.ndarray
    """Of the fold's validation images, in the order of its indices."""
    images: int
    """Trained on in an epoch."""
    diverged: str


class _FoldModel:
    """The model of one fold, and the file that it goes on from."""

    def __init__(
        self,
        experiment: Experiment,
        material: SharedDataset,
        number: int,
        fold: Fold,
        order: dict[str, Any],
        alone: bool,
        go_on: bool,
    ) -> None:
        import torch

        self._experiment, self._number, self._order, self._alone = experiment, number, order, alone
        self._labels_N, self._valid_indices = material.labels_N[fold.valid_indices], fold.valid_indices
        self.training = material.training(
            Hyperparameters(**order["configuration"]), fold.train_indices, order["seed"], alone=alone
        )
        self._history: list[dict[str, float]] = []
        self._probabilities_NC = np.empty(0)
        kept = (experiment.read(state_file(order["number"], number)) if go_on else None) or b""
        digest, content = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
        # else there is none, or one that was read while a process that is about to die wrote another
        if digest == hashlib.sha256(content).digest():
            state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            if state["order"] == order:  # else it belongs to a trial of that number in another study
                self.training.load_state_dict(state["training"])
                self._history = state["history"]

    def run_to(self, epoch: int) -> _Outcome:
        """The model after so many epochs, of which it may have ended some or all before an interruption."""
        from lungct_tune.training.trainer import NotFiniteLoss

        diverged = ""
        try:
            if self.training.epoch < epoch:
                self._history.append(self._train_and_validate())
            elif not len(self._probabilities_NC):
                self._probabilities_NC = self.training.probabilities(self._valid_indices)
        except NotFiniteLoss as error:
            diverged = f"fold {self._number}: {error}" if self._alone else str(error)
        images = self.training.steps * self.training.share * self.training.world
        return _Outcome(self._number, self._history, self._probabilities_NC, images, diverged)

    def _train_and_validate(self) -> dict[str, float]:
        from lungct_tune.training.trainer import NotFiniteLoss

        began = time.perf_counter()
        loss = self.training.train_epoch()
        trained = time.perf_counter()
        self._probabilities_NC = self.training.probabilities(self._valid_indices)
        if not np.isfinite(self._probabilities_NC).all():
            raise NotFiniteLoss(f"predictions are not finite after epoch {self.training.epoch}")
        figures = validation_figures(self._labels_N, self._probabilities_NC)
        validated = time.perf_counter()
        seconds = {"train_s": trained - began, "valid_s": validated - trained, "at": time.time()}
        return {"epoch": self.training.epoch, "train_loss": loss} | figures | seconds

    def keep(self) -> int:
        """Writes all that the model needs to go on, after its sha256; the bytes of that."""
        import torch

        stream = io.BytesIO()
        torch.save({"order": self._order, "training": self.training.state_dict(), "history": self._history}, stream)
        content = stream.getvalue()
        self._experiment.write(
            state_file(self._order["number"], self._number), hashlib.sha256(content).digest() + content
        )
        return DIGEST_BYTES + len(content)


def _figures_of_epoch(by_worker: Sequence[Sequence[_Outcome]], epoch: int) -> dict[str, float]:
    """The mean figures of the folds, their spread, and the seconds of the worker that took longest."""
    folds = [outcome.history[epoch] for outcome in chain(*by_worker)]
    figures = {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]} | {"epoch": epoch + 1}
    for name in ("train_s", "valid_s"):
        figures[name] = max(sum(outcome.history[epoch][name] for outcome in worker) for worker in by_worker)
    figures["at"] = max(fold["at"] for fold in folds)
    if len(folds) > 1:
        figures[OBJECTIVE_SD] = float(np.std([fold[OBJECTIVE] for fold in folds], ddof=1))
    return figures
