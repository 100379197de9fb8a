"""Runs a trial on the workers of a slot: trains it step by step, keeps its state, reports its figures.

Without folds all workers train one model together, each on its share of every batch. With folds every worker trains
models of its own, one for each fold, so that no gradients are exchanged. This works without Ray too: in one process, or
in any torch.distributed process group.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lungct_tune.experiment.folder import TRIAL_WEIGHTS, VALID, old_state_file, state_file, trial_folder
from lungct_tune.experiment.trial import EpochCost, EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.collectives import gather, of_first, rank_and_world
from lungct_tune.tuning.fold_model import FoldModel, mean_figures
from lungct_tune.tuning.trial_state import StateWriter, read_state, saved_epochs

if TYPE_CHECKING:
    import torch

    from lungct_tune.tuning.slot_plan import SlotPlan

STEP_S = 1.0
"""A step ends with the first epoch that ends after so many seconds, so that the study and the display keep up."""

AHEAD_S = 3.0
"""The next step is trained before it is ordered if one took less than so many seconds. Who stops the search waits so
much longer at most."""

PAUSE_S = 5.0
"""How long a trial that has ended waits before it tries again to write its files to a storage that refused them."""


@dataclass(frozen=True)
class _WorkerEpoch:
    """What a worker tells the others after an epoch."""

    epoch: int
    folds: dict[int, EpochFigures]
    """By the numbers of the folds whose models it has."""
    diverged: str
    step_is_over: bool
    save: bool
    """Whether it wants a state to be saved."""
    can_save: bool
    """Whether its writer is idle."""
    saved: int
    """The epoch of its newest complete state."""


class TrialRunner:
    """A worker's part of one trial. All workers of a slot create and call theirs at the same time.

    A trial's figures are the means over its folds.

    Args:
        plan: of the slot. Its experiment has the trial's states, of which the newest is read at the start.
        device: where this worker trains.
        slot: the number of the slot, noted in the figures.
        warn: is called with a sentence if the storage refuses a file.
    """

    def __init__(
        self,
        plan: SlotPlan,
        order: TrialOrder,
        device: torch.device,
        slot: int,
        warn: Callable[[str], None],
    ) -> None:
        self.order, folds = order, plan.folds
        self._experiment, self._epochs, self._rungs = plan.experiment, plan.dataset.epochs, plan.rungs
        self._interval, self._slot, self._warn = plan.checkpoint_interval, slot, warn
        self._rank, self._world = rank_and_world()
        self._each_alone = len(folds) > 1
        mine = range(self._rank, len(folds), self._world) if self._each_alone else [0]
        self._models = {k: FoldModel(plan.dataset, folds[k], order, device, self._each_alone) for k in mine}
        images = sum(model.images for model in self._models.values())
        self._images = sum(gather(images)) if self._each_alone else images
        self._in_order = np.argsort(np.concatenate([fold.valid_rows for fold in folds]))
        self._history: list[EpochFigures] = []
        self._ended = False
        self.goes_on = False
        """Whether the next step will be ordered: the trial has not ended, and does not stand at a rung. Where a step
        takes long, False."""
        # not a method of this object: a thread that still writes would keep the models of a trial that has ended
        self._state_file = partial(state_file, order.number, rank=self._rank)
        self._writer = StateWriter(plan.experiment, self._state_file)
        self._resume()
        self._saved_at = time.monotonic()
        self._reported = 0

    def run(self, must_save: Callable[[], bool] = lambda: False) -> EpochReport:
        """Trains the trial on to the next rung, to its last epoch, or for a second; returns the report for the study.

        Args:
            must_save: whether a state is to be saved as soon as possible, because the worker may be lost.

        Raises:
            RuntimeError: the workers have trained different numbers of epochs.
        """
        began, bytes_before, waited_before = time.monotonic(), self._writer.bytes, self._writer.waited_s
        first, known, outcome, reason = self._reported, len(self._history), Outcome.RUNNING, ""
        step_is_over = known == self._epochs
        while not step_is_over:
            by_worker = gather(self._train_epoch(began, must_save))
            if reason := next((worker.diverged for worker in by_worker if worker.diverged), ""):
                outcome = Outcome.DIVERGED
                break
            self._note_epoch(by_worker)
            self._keep_state(by_worker)
            reached = len(self._history)
            step_is_over = any(worker.step_is_over for worker in by_worker) or reached in (*self._rungs, self._epochs)
        if len(self._history) == self._epochs:
            outcome = Outcome.COMPLETED
            self._keep_model()
        self._ended, self._reported = outcome is not Outcome.RUNNING, len(self._history)
        took_s = sum(figures.seconds for figures in self._history[known:])  # the same on all workers, as is the rest
        self.goes_on = not self._ended and self._reported not in self._rungs and took_s < AHEAD_S
        cost = EpochCost(
            epochs=len(self._history) - known,
            images=self._images,
            checkpoint_bytes=self._writer.bytes - bytes_before,
            checkpoint_s=self._writer.waited_s - waited_before,
        )
        return EpochReport(outcome, tuple(self._history[first:]), cost, reason)

    def close(self) -> None:
        """Saves the state of a trial that has not ended, and waits for it.

        A trial that stands at a rung may have been stopped there, so its state is not saved.

        Raises:
            StorageError: the storage refuses.
        """
        epoch = len(self._history)
        if self._ended or epoch in self._rungs or not (self._rank == 0 or self._each_alone):
            return
        self._writer.wait()
        self._writer.take_error()  # of an older state
        if self._writer.newest != epoch:
            self._writer.start(epoch, self._state())
            self._writer.wait()
        if (error := self._writer.take_error()) is not None:
            raise error

    def drop(self) -> None:
        """Notes that the trial has ended, so that no state of it stays on the storage."""
        self._writer.drop()

    def _train_epoch(self, began: float, must_save: Callable[[], bool]) -> _WorkerEpoch:
        from lungct_tune.training.trainer import NotFiniteLoss

        diverged, figures = "", {}
        decides = len(self._history) + 1 in (*self._rungs, self._epochs)
        try:
            for number, model in self._models.items():
                figures[number] = model.train_and_validate(rough=not decides)
        except NotFiniteLoss as not_finite:
            diverged = f"fold {number}: {not_finite}" if self._each_alone else str(not_finite)
        if (error := self._writer.take_error()) is not None:
            self._warn(f"trial {self.order.number} goes on, but its state is not saved: {error}")
        now = time.monotonic()
        return _WorkerEpoch(
            epoch=next(iter(self._models.values())).trainer.epoch,
            folds=figures,
            diverged=diverged,
            step_is_over=now - began >= STEP_S,
            save=now - self._saved_at >= self._interval or must_save(),
            can_save=self._writer.is_idle,
            saved=self._writer.newest,
        )

    def _note_epoch(self, by_worker: Sequence[_WorkerEpoch]) -> None:
        if len({worker.epoch for worker in by_worker}) > 1:
            raise RuntimeError(f"workers are at different epochs: {[worker.epoch for worker in by_worker]}")
        if not self._each_alone:  # all workers have the same model, and the first one's times count
            by_worker = by_worker[:1]
        self._history.append(mean_figures([worker.folds for worker in by_worker], self._slot))

    def _keep_state(self, by_worker: Sequence[_WorkerEpoch]) -> None:
        """Starts to save a state if one is due and all earlier ones are written."""
        epoch = len(self._history)
        due = any(worker.save for worker in by_worker) and all(worker.can_save for worker in by_worker)
        if due and epoch < self._epochs:
            self._saved_at = time.monotonic()
            if self._rank == 0 or self._each_alone:
                writers = by_worker if self._each_alone else by_worker[:1]
                self._writer.start(epoch, self._state(), complete=min(worker.saved for worker in writers))

    def _state(self) -> dict[str, Any]:
        return {
            "order": self.order.identity,
            "folds": {k: model.trainer.state_dict() for k, model in self._models.items()},
            "history": [figures.as_dict() for figures in self._history],
        }

    def _resume(self) -> None:
        """Continues from the newest state that all workers can read, if there is one."""
        number, files = self.order.number, self._world if self._each_alone else 1
        for epoch in of_first(saved_epochs(self._experiment, number, files) if self._rank == 0 else []):
            state = self._read_state(self._state_file(epoch))
            if all(gather(state is not None)):
                assert state is not None
                for k, model in self._models.items():
                    model.trainer.load_state_dict(state["folds"][k])
                self._history = [EpochFigures(**figures) for figures in state["history"]]
                self._writer = StateWriter(self._experiment, self._state_file, epoch)
                return
        self._resume_old()

    def _read_state(self, file: str) -> dict[str, Any] | None:
        """The state in a file; None if there is none, it is damaged, or it is of another study's trial."""
        state = read_state(self._experiment, file, each_alone=self._each_alone)
        return state if state and state["order"] == self.order.identity else None

    def _resume_old(self) -> None:
        """Continues from the states of version 0.1, a file for each fold, if all are of the same epoch."""
        states = {k: self._read_state(old_state_file(self.order.number, k)) for k in self._models}
        mine = {k: [EpochFigures(**e) for e in state["history"]] if state else [] for k, state in states.items()}
        by_worker = gather(mine) if self._each_alone else [mine]
        lengths = {len(history) for worker in by_worker for history in worker.values()}
        if len(lengths) > 1:
            return
        for k, model in self._models.items():
            if (state := states[k]) is not None:
                model.trainer.load_state_dict(state["training"])
        for epoch in range(*lengths):
            of_epoch = [{k: history[epoch] for k, history in worker.items()} for worker in by_worker]
            self._history.append(mean_figures(of_epoch, None))

    def _keep_model(self) -> None:
        """Writes weights and predictions, if the trial is one of the best. Waits for the storage."""
        last = self._history[-1]
        if self.order.weights_from is None or last.rank >= self.order.weights_from:
            mine = {k: model.predictions() for k, model in self._models.items()}
            by_fold = dict(chain(*(worker.items() for worker in gather(mine))))
            if self._rank == 0:
                probabilities_NC = np.concatenate([by_fold[k] for k in sorted(by_fold)])[self._in_order]
                began = time.perf_counter()
                for path, content in self._files(last, probabilities_NC).items():
                    self._write(path, content)
                self._writer.waited_s += time.perf_counter() - began
        gather(None)  # no worker answers before the files are written

    def _files(self, last: EpochFigures, probabilities_NC: np.ndarray) -> dict[str, bytes | memoryview]:
        import safetensors.torch

        metadata = {"epoch": str(last.epoch), OBJECTIVE: str(last.balanced_accuracy)}
        valid = io.BytesIO()
        np.save(valid, probabilities_NC)
        folder = trial_folder(self.order.number)
        return {
            f"{folder}/{TRIAL_WEIGHTS}": safetensors.torch.save(self._models[0].trainer.model_state(), metadata),
            f"{folder}/{VALID}": valid.getbuffer(),
        }

    def _write(self, path: str, content: bytes | memoryview) -> None:
        """Writes a file, as often as it takes."""
        while True:
            try:
                self._experiment.write(path, content)
                self._writer.bytes += len(content)
                return
            except StorageError as error:
                self._warn(f"trial {self.order.number} has ended and waits for the storage: {error}")
                time.sleep(PAUSE_S)
