"""The final retraining: the best configuration on train and validation together, evaluated once on test."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport
from lungct_tune.stopping import stop_delayed
from lungct_tune.tuning.mailbox import open_mailbox
from lungct_tune.tuning.ray_compat import draining_nodes
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.trial_state import StateWriter, from_bytes, read_bytes

if TYPE_CHECKING:
    import torch

    from lungct_tune.training.trainer import Trainer
    from lungct_tune.tuning.workers import SlotPlan

WATCH_S = 1.0
"""How often a search that runs is asked whether the retraining's workers may start, and these for their news."""

NEWS_S = 30.0
"""How long the mailbox gets to answer."""

STATE, WEIGHTS, PREDICTIONS = "last.pt", "model.safetensors", "test_probabilities.npy"
FEATURES = "features.npz"
"""The files of a retraining. The predictions are written last, so they say that it has ended."""

SAMPLE = 2000
"""The most training images whose features are kept. More would hardly change their distribution."""


class RetrainingFailed(UserError):
    """The final retraining failed for good. The message says why and how to continue."""


@dataclass(frozen=True)
class RetrainOrder:
    """What the workers of a slot get to retrain a trial's hyperparameters on train and validation together.

    The schedule has as many epochs as that of the trial. For an ensemble, an order has a fold, and its model is trained
    without that fold's images: with the trial's seed, so that it is the model that the trial had.
    """

    number: int
    """Of the trial."""
    hyperparameters: Hyperparameters
    seed: int
    epochs: int
    test: SharedDataset
    """The images of test. No order of the search has them."""
    checkpoint_interval: float
    """Seconds of training between two states."""
    fold: int | None = None

    @property
    def folder(self) -> str:
        without = "" if self.fold is None else f"_without_fold_{self.fold}"
        return f"final/trial_{self.number:04d}_{self.epochs:03d}_epochs{without}"

    def file(self, name: str) -> str:
        return f"{self.folder}/{name}"


class EarlySlot:
    """A slot for what comes after the search. It starts while the last trials run, if there is room beside them.

    Args:
        plan: the slot's configuration.
        trials_so_far: tells how many trials have begun, and how many of them have ended.
        last: how many trials will have begun, and how many have ended, when the last ones run.
        prepare: is called now and then once a trial has ended, for the driver's imports that are needed at the end.
        warn: is called with what slot and workers have to say, a sentence each.
    """

    def __init__(
        self,
        plan: SlotPlan,
        trials_so_far: Callable[[], tuple[int, int]],
        last: tuple[int, int],
        prepare: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._plan, self._trials_so_far, self._last = plan, trials_so_far, last
        self._prepare, self._warn = prepare, warn
        self._search = f"{plan.experiment.name} final"  # what ends with the search is found by the search's name
        self._slot: Any = None
        self._mailbox: Any = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._start_early, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self._mailbox:
            ray.kill(self._mailbox)

    def run(self, order: RetrainOrder, meanwhile: Callable[[], None], note_epoch: Callable[[int], None]) -> EpochReport:
        """Retrains, after the search has ended. The slot starts now if it has not started yet.

        Args:
            meanwhile: is called in this process while the workers train.
            note_epoch: is called in this process, now and then, with the last epoch that has ended.
        """
        self._stop_watching()
        if not self._slot:
            self._start()
        retraining = self._slot.run(order)
        meanwhile()
        try:
            while not ray.wait([retraining], timeout=WATCH_S)[0]:
                self._exchange_news()
                with suppress(ray.exceptions.RayError):
                    note_epoch(ray.get(self._mailbox.epoch_of.remote(order.folder), timeout=NEWS_S))
            report: EpochReport = ray.get(retraining)
        finally:
            self._exchange_news()
        return report

    def _exchange_news(self) -> None:
        with suppress(ray.exceptions.RayError):  # the mailbox may be starting again
            for sentence in ray.get(self._mailbox.exchange.remote(draining_nodes()), timeout=NEWS_S):
                self._warn(sentence)

    def release(self) -> None:
        """Ends the workers. `run` starts new ones if it is called again."""
        self._stop_watching()
        self._release()

    def _stop_watching(self) -> None:
        self._ended.set()
        self._watch.join()

    def _start(self) -> None:
        from lungct_tune.tuning.slot_actor import SlotActor

        with stop_delayed():
            self._mailbox = open_mailbox(self._search)
            self._slot = SlotActor(self._plan, self._search)

    def _release(self) -> None:
        from lungct_tune.tuning.groups import remove_placement_groups

        if self._slot:
            self._slot.end()
            remove_placement_groups(f"{self._search} slot")
        self._slot = None

    def _start_early(self) -> None:
        from lungct_tune.tuning.groups import waiting_for_room

        crowded = 0  # how often in a row: workers that start wait for a moment
        try:
            while not self._ended.wait(WATCH_S):
                begun, ended = self._trials_so_far()
                if ended:
                    self._prepare()
                crowded = crowded + 1 if waiting_for_room(self._plan) else 0
                if self._slot and crowded > 1:
                    # a slot of the search has lost its workers and needs the room, or the free room is on several
                    # nodes, and none of them holds a worker
                    self._release()
                    return
                are_last = begun >= self._last[0] and ended >= self._last[1]
                if are_last and not self._slot and not crowded and self._has_room():
                    self._start()
        except Exception as error:  # of the study or the cluster: the search goes on, and needs the room
            self._warn(f"the workers of the retraining start only after the search: {error}")
            self._release()

    def _has_room(self) -> bool:
        free = ray.available_resources()
        needed = {kind: amount * self._plan.workers for kind, amount in self._plan.resources_per_worker.items()}
        return all(free.get(kind, 0) >= amount for kind, amount in needed.items())


def retrain_and_predict(
    experiment: Experiment,
    order: RetrainOrder,
    slot: EarlySlot,
    meanwhile: Callable[[], None] = lambda: None,
    note_epoch: Callable[[int], None] = lambda epoch: None,
) -> RetrainedModel:
    """Retrains in a slot. An interrupted retraining continues from its last state; one that has ended is only read.

    Args:
        meanwhile, note_epoch: see `EarlySlot.run`.

    Raises:
        RetrainingFailed: its workers were lost too often, or it needs more memory than there is.
        StorageError: its files cannot be read.
    """
    result = _read_result(experiment, order)
    if result is None:
        try:
            reason = slot.run(order, meanwhile, note_epoch).reason
        except ray.exceptions.RayActorError as error:
            reason = str(error)
        if reason:
            raise RetrainingFailed(
                f"the final retraining failed: {reason}\n"
                "Fix the cause (Ray's log files have the full error; --verbose prints it); "
                "the search is kept, and --resume continues with the retraining"
            )
        result = _read_result(experiment, order)
    assert result is not None  # the workers have written it
    return result


def retrain_all(
    experiment: Experiment,
    orders: Sequence[RetrainOrder],
    slot: EarlySlot,
    meanwhile: Callable[[], None] = lambda: None,
    note_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[RetrainedModel]:
    """Retrains the members of an ensemble, or a single model, one after the other.

    Args:
        meanwhile: see `EarlySlot.run`.
        note_epoch: is called with the number of epochs of all of them that have ended.

    Raises:
        RetrainingFailed, StorageError: see `retrain_and_predict`.
    """
    models: list[RetrainedModel] = []
    for order in orders:
        before = len(models) * order.epochs

        def note(epoch: int, before: int = before) -> None:
            note_epoch(before + epoch)

        models.append(retrain_and_predict(experiment, order, slot, meanwhile, note))
    return models


def _read_result(experiment: Experiment, order: RetrainOrder) -> RetrainedModel | None:
    predictions = experiment.read(order.file(PREDICTIONS))
    weights = experiment.read(order.file(WEIGHTS)) if predictions else None
    if not weights or not predictions:
        return None
    return RetrainedModel(weights, np.load(io.BytesIO(predictions)), experiment.read(order.file(FEATURES)))


def retrain(
    experiment: Experiment,
    dataset: SharedDataset,
    order: RetrainOrder,
    device: torch.device,
    rows: np.ndarray | None = None,
    must_save: Callable[[], bool] = lambda: False,
    warn: Callable[[str], None] = lambda sentence: None,
    note_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Trains to the last epoch, predicts the test images, and writes the files. All workers call it together.

    Args:
        dataset: the images of train and validation.
        rows: those of them that are trained on; by default all.
        must_save: whether a state is to be saved as soon as possible, because the first worker may be lost.
        warn: is called with a sentence if the storage refuses a state.
        note_epoch: is called with the number of each epoch that has ended.
    """
    import safetensors.torch

    rows = dataset.rows if rows is None else rows
    trainer = dataset.trainer(order.hyperparameters, rows, order.seed, device, epochs=order.epochs)
    _resume(experiment, order, trainer)
    writer, saved_at = StateWriter(experiment, lambda epoch: order.file(STATE)), time.monotonic()
    while trainer.epoch < order.epochs:
        trainer.train_epoch()
        if trainer.rank == 0:
            note_epoch(trainer.epoch)
        due = time.monotonic() - saved_at >= order.checkpoint_interval or must_save()
        if trainer.rank == 0 and due and writer.is_idle and trainer.epoch < order.epochs:
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


def _resume(experiment: Experiment, order: RetrainOrder, trainer: Trainer) -> None:
    """Continues from the last state, if there is one that is whole.

    Only the first worker reads it. If each read the storage, one of them might find another state than the others, and
    data-parallel training goes wrong without an error then.
    """
    import torch.distributed as dist

    kept = [read_bytes(experiment, order.file(STATE)) if trainer.rank == 0 else b""]
    if trainer.world > 1:
        dist.broadcast_object_list(kept, src=0)
    if kept[0]:
        trainer.load_state_dict(from_bytes(kept[0]))
