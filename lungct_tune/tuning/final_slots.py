"""The slots of the final retrainings: several at the same time, and the first may start before the search ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Self

import optuna
import ray

from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.trial import EpochReport, Outcome
from lungct_tune.stopping import stop_delayed
from lungct_tune.tuning.allocation import workers_that_fit
from lungct_tune.tuning.groups import waiting_for_room
from lungct_tune.tuning.mailbox import ANSWER_S
from lungct_tune.tuning.ray_compat import free_resources
from lungct_tune.tuning.retrain import RetrainOrder, read_result
from lungct_tune.tuning.slot_actor import SlotQueue
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.time_left import TimeLeft

WATCH_S = 1.0
"""How often a search that runs is asked whether the first workers may start."""

SOON_S = 60.0
"""How long before the end of a whole search workers of the retraining may start in room that the search leaves free.
Their start takes some 10 s."""


class RetrainingFailed(UserError):
    """The final retraining failed for good. The message says why and how to continue."""


class FinalSlots:
    """The slots for what comes after the search. The first starts beside the last trials, if there is room.

    Args:
        plan: the configuration of each slot.
        slots: how many there are at most.
        nears_end: tells whether the search needs no more room, and will end soon.
        prepare: is called now and then from that moment on, for the driver's imports that are needed at the end.
    """

    def __init__(
        self,
        plan: SlotPlan,
        slots: int,
        nears_end: Callable[[], bool],
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self._plan, self._slots, self._nears_end, self._prepare = replace(plan, kind="final"), slots, nears_end, prepare
        self._queue: SlotQueue | None = None
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._start_early, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def retrain(
        self,
        orders: Sequence[RetrainOrder],
        compared: Sequence[RetrainOrder] = (),
        meanwhile: Callable[[], None] = lambda: None,
        note_epochs: Callable[[Mapping[str, int]], None] = lambda epochs: None,
    ) -> tuple[list[RetrainedModel], list[RetrainedModel]]:
        """Retrains, after the search has ended; returns the models in the order of the orders.

        An interrupted retraining continues from its last state; one that has ended is only read. Slots that have not
        started yet start now.

        Args:
            compared: what is retrained for a comparison. If one of these diverges, none is returned.
            meanwhile: is called in this process while the workers train.
            note_epochs: is called in this process, now and then, with the last epoch of each retraining that has not
                ended, by its folder.

        Raises:
            RetrainingFailed: workers were lost too often, a retraining needs more memory than there is, or one of
                `orders` has diverged.
            StorageError: the files cannot be read.
        """
        experiment = self._plan.experiment
        models = {order.folder: read_result(experiment, order) for order in (*orders, *compared)}
        left = [order for order in (*orders, *compared) if models[order.folder] is None]
        note_epochs({order.folder: 0 for order in left})
        if left:
            self._run(left, meanwhile, note_epochs)
            models |= {order.folder: read_result(experiment, order) for order in left}
        else:
            self.release()
        ours, theirs = ([models[order.folder] for order in some] for some in (orders, compared))
        retrained = [model for model in ours if model is not None]
        if len(retrained) < len(orders):
            raise RetrainingFailed(
                f"{next(order.what for order, model in zip(orders, ours, strict=True) if model is None)} has diverged. "
                "Let the search go on, so that another configuration can win: --resume NAME --trials N with more trials"
            )
        return retrained, [] if None in theirs else [model for model in theirs if model is not None]

    def _run(
        self,
        orders: Sequence[RetrainOrder],
        meanwhile: Callable[[], None],
        note_epochs: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._stop_watching()
        queue = self._start(min(self._slots, len(orders)))
        futures = queue.run(orders, self._note)
        meanwhile()

        def note() -> None:
            running = [order.folder for order, future in zip(orders, futures, strict=True) if not future.done()]
            with suppress(ray.exceptions.RayError):
                note_epochs(ray.get(self._plan.mailbox.epochs_of.remote(running), timeout=ANSWER_S))

        queue.wait(futures, note)

    def _note(self, order: RetrainOrder, report: EpochReport) -> None:
        """Tells the user of a retraining that has diverged. It leaves no files.

        Raises:
            RetrainingFailed: see `retrain`.
        """
        if report.outcome is Outcome.DIVERGED:
            self._plan.mailbox.warn.remote(f"{order.what} has diverged: {report.reason}")
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
            self._queue = self._queue or SlotQueue(self._plan)
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
            self._plan.mailbox.warn.remote(f"the workers of the retraining start only after the search: {error}")
            self._release()

    def _has_room(self) -> bool:
        avoided: set[str] = ray.get(self._plan.mailbox.avoid.remote(set()), timeout=ANSWER_S)
        free = [resources for node, resources in free_resources().items() if node not in avoided]
        return workers_that_fit(free, self._plan.resources_per_worker) >= self._plan.workers


def nears_end(study: optuna.Study, trials: int, slots: int, left: TimeLeft) -> bool:
    """Whether every slot of a search has a trial, and one has no more of them or the whole search will end soon.

    Args:
        trials: of the whole search.
        left: estimates the time to its end.
    """
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    begun, ended = sum(state.name != "WAITING" for state in states), sum(state.is_finished() for state in states)
    if begun < min(trials, slots) or not left.has_started:
        return False
    seconds = left.seconds
    return (begun >= trials and ended > 0) or (seconds is not None and seconds[1] < SOON_S)
