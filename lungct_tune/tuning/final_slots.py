"""The slots of the final retrainings: several at the same time, and the first may start before the search ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Self

import ray

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport, Outcome
from lungct_tune.stopping import stop_delayed
from lungct_tune.tuning.allocation import workers_that_fit
from lungct_tune.tuning.groups import waiting_for_room
from lungct_tune.tuning.mailbox import NEWS_S
from lungct_tune.tuning.ray_compat import free_resources
from lungct_tune.tuning.retrain import RetrainOrder, read_result
from lungct_tune.tuning.slot_actor import SlotQueue
from lungct_tune.tuning.slot_plan import SlotPlan

WATCH_S = 1.0
"""How often a search that runs is asked whether the first workers may start."""


class RetrainingFailed(UserError):
    """The final retraining failed for good. The message says why and how to continue."""


class FinalSlots:
    """The slots for what comes after the search. The first starts beside the last trials, if there is room.

    Args:
        plan: the configuration of each slot.
        slots: how many there are at most.
        nears_end: tells whether the search needs no more room, and will end soon.
        prepare: is called now and then from that moment on, for the driver's imports that are needed at the end.
        warn: is called with what slots and workers have to say, a sentence each.
    """

    def __init__(
        self,
        plan: SlotPlan,
        slots: int,
        nears_end: Callable[[], bool],
        prepare: Callable[[], object] = lambda: None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._plan, self._slots, self._nears_end = plan, slots, nears_end
        self._prepare, self._warn = prepare, warn
        self._queue: SlotQueue | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._start_early, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def run(
        self,
        orders: Sequence[RetrainOrder],
        meanwhile: Callable[[], None],
        note_epochs: Callable[[Mapping[str, int]], None],
    ) -> None:
        """Retrains, after the search has ended. Slots that have not started yet start now.

        Args:
            meanwhile, note_epochs: see `retrain_all`.

        Raises:
            RetrainingFailed: see `retrain_all`.
        """
        self._stop_watching()
        queue = self._start(min(self._slots, len(orders)))
        futures = queue.run(orders, self._note)
        meanwhile()

        def note() -> None:
            running = [order.folder for order, future in zip(orders, futures, strict=True) if not future.done()]
            with suppress(ray.exceptions.RayError):
                note_epochs(ray.get(self._plan.mailbox.epochs_of.remote(running), timeout=NEWS_S))

        queue.wait(futures, note)

    def _note(self, order: RetrainOrder, report: EpochReport) -> None:
        """Tells the user of a retraining that has diverged. It leaves no files.

        Raises:
            RetrainingFailed: see `retrain_all`.
        """
        if report.outcome is Outcome.DIVERGED:
            self._warn(f"{order.what} has diverged: {report.reason}")
        elif report.reason:
            raise RetrainingFailed(
                f"{order.what} failed: {report.reason}\n"
                "Fix the cause (Ray's log files have the full error; --verbose prints it); "
                "the search is kept, and --resume continues with the retraining"
            )

    def release(self) -> None:
        """Ends the workers."""
        self._stop_watching()
        self._release()

    def _stop_watching(self) -> None:
        self._ended.set()
        with stop_delayed():  # see `SlotQueue.end`
            self._watch.join()

    def _start(self, slots: int) -> SlotQueue:
        with stop_delayed():
            self._queue = self._queue or SlotQueue(self._plan, self._warn, f"{self._plan.experiment.name} final")
            self._queue.start(slots)
        return self._queue

    def _release(self) -> None:
        if self._queue:
            self._queue.end()
        self._queue = None

    def _start_early(self) -> None:
        crowded = 0  # how often in a row: workers that start wait for a moment
        try:
            while not self._ended.wait(WATCH_S):
                nears_end = self._nears_end()
                crowded = crowded + 1 if waiting_for_room(self._plan.experiment.name) else 0
                if self._queue and crowded > 1:
                    # a slot of the search has lost its workers and needs the room, or the free room is on several
                    # nodes, and none of them holds a worker
                    self._release()
                    return
                if nears_end and not self._queue and not crowded and self._has_room():
                    self._start(1)
                if nears_end:
                    self._prepare()
        except Exception as error:  # of the study or the cluster: the search goes on, and needs the room
            self._warn(f"the workers of the retraining start only after the search: {error}")
            self._release()

    def _has_room(self) -> bool:
        avoided: set[str] = ray.get(self._plan.mailbox.avoid.remote(set()), timeout=NEWS_S)
        free = [resources for node, resources in free_resources().items() if node not in avoided]
        return workers_that_fit(free, self._plan.resources_per_worker) >= self._plan.workers


def retrain_all(
    experiment: Experiment,
    orders: Sequence[RetrainOrder],
    compared: Sequence[RetrainOrder],
    slots: FinalSlots,
    meanwhile: Callable[[], None] = lambda: None,
    note_epochs: Callable[[Mapping[str, int]], None] = lambda epochs: None,
) -> tuple[list[RetrainedModel], list[RetrainedModel]]:
    """Retrains in slots; returns the models in the order of the orders.

    An interrupted retraining continues from its last state; one that has ended is only read.

    Args:
        compared: what is retrained for a comparison. If one of these diverges, none is returned.
        meanwhile: is called in this process while the workers train.
        note_epochs: is called in this process, now and then, with the last epoch of each retraining that has not ended,
            by its folder.

    Raises:
        RetrainingFailed: workers were lost too often, a retraining needs more memory than there is, or one of `orders`
            has diverged.
        StorageError: the files cannot be read.
    """
    models = {order.folder: read_result(experiment, order) for order in (*orders, *compared)}
    left = [order for order in (*orders, *compared) if models[order.folder] is None]
    note_epochs({order.folder: 0 for order in left})
    if left:
        slots.run(left, meanwhile, note_epochs)
        models |= {order.folder: read_result(experiment, order) for order in left}
    else:
        slots.release()
    ours, theirs = ([models[order.folder] for order in some] for some in (orders, compared))
    retrained = [model for model in ours if model is not None]
    if len(retrained) < len(orders):
        raise RetrainingFailed(
            f"{next(order.what for order, model in zip(orders, ours, strict=True) if model is None)} has diverged. "
            "Let the search go on, so that another configuration can win: --resume NAME --trials N with more trials"
        )
    return retrained, [] if None in theirs else [model for model in theirs if model is not None]
