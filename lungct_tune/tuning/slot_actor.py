"""Slots that Ray Tune does not manage, each in an actor on the head node, and a queue of orders for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import ray

from lungct_tune.errors import UserError
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.stopping import stop_delayed
from lungct_tune.tuning.groups import remove_placement_groups
from lungct_tune.tuning.retrain import RetrainOrder
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.slots import ON_HEAD, Slot

RELEASE_S = 15.0
"""How long workers get to end."""

KILLED_S = 10.0
"""How long an actor that is killed gets to be gone."""

POLL_S = 1.0
"""How often a slot that has no workers yet is asked for them, and how soon one that works notices that it is to end."""

Order = TypeVar("Order", TrialOrder, RetrainOrder)


class SlotActor:
    """A slot in an actor.

    Its workers' placement group has the slot's name. So it can be removed after the actor was killed.
    """

    def __init__(self, plan: SlotPlan) -> None:
        actor = ray.remote(Slot).options(num_cpus=0, resources=ON_HEAD, max_concurrency=2)
        self._actor: Any = actor.remote(plan)

    def run(self, order: TrialOrder | RetrainOrder) -> ray.ObjectRef[EpochReport]:
        """Starts a step (see `Slot.run`); returns its future report."""
        future: ray.ObjectRef[EpochReport] = self._actor.run.remote(order)
        return future

    def has_workers(self) -> bool:
        """Whether an order need not wait for room; see `Slot.has_workers`."""
        with suppress(ray.exceptions.RayError):
            return bool(ray.get(self._actor.has_workers.remote(), timeout=POLL_S))
        return False

    def end(self) -> None:
        """Ends the workers and the actor. Then the slot's placement group can be removed, if one is left."""
        with suppress(ray.exceptions.RayError):
            ray.get(self._actor.release.remote(), timeout=RELEASE_S)
        ray.kill(self._actor)
        deadline = time.monotonic() + KILLED_S
        while time.monotonic() < deadline:  # until it is gone it may make a placement group
            try:
                ray.get(self._actor.__ray_ready__.remote(), timeout=1)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return
            time.sleep(0.05)


class SlotQueue:
    """Slots that take orders from one queue.

    Each slot but the first takes an order only when it has workers. So one that never gets room keeps no order from the
    others. A slot for which no order is left ends, and gives its room back.

    Args:
        plan: of every slot.
    """

    def __init__(self, plan: SlotPlan) -> None:
        self._plan = plan
        self._slots: list[SlotActor] = []
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    def start(self, slots: int) -> None:
        """Starts slots until there are so many."""
        with stop_delayed():
            self._slots += [SlotActor(self._plan) for _ in range(slots - len(self._slots))]

    def run(
        self,
        orders: Iterable[Order],
        note: Callable[[Order, EpochReport], None] = lambda order, report: None,
        epochs: int | None = None,
    ) -> list[Future[EpochReport]]:
        """Gives the slots their orders, once; returns the future reports, in the order of the orders.

        Args:
            note: see `follow`. It is called in the threads of the slots.
            epochs: see `follow`.
        """
        waiting = deque((order, Future[EpochReport]()) for order in orders)
        futures = [future for _, future in waiting]
        for slot in self._slots:
            thread = threading.Thread(target=self._serve, args=(slot, waiting, note, epochs), daemon=True)
            self._threads.append(thread)
            thread.start()
        return futures

    def wait(self, futures: list[Future[EpochReport]], note: Callable[[], None] = lambda: None) -> None:
        """Waits until all have ended, or one has failed.

        Args:
            note: is called now and then.

        Raises:
            Exception: what has failed.
        """
        running = set(futures)
        while running:
            ended, running = wait(running, POLL_S, FIRST_EXCEPTION)
            for future in ended:
                future.result()
            note()

    def end(self) -> None:
        """Ends all slots at the same time, whatever they do.

        A stop waits for it: Ray ends a process whose threads use it after its own end, with no word to the user.
        """
        self._ended.set()
        with stop_delayed():
            if not self._threads:
                self.run([])
            for thread in self._threads:
                thread.join()
            remove_placement_groups(self._plan.slots)

    def _serve(
        self,
        slot: SlotActor,
        waiting: deque[tuple[Order, Future[EpochReport]]],
        note: Callable[[Order, EpochReport], None],
        epochs: int | None,
    ) -> None:
        while waiting and not self._ended.is_set():
            if slot is not self._slots[0] and not slot.has_workers():
                self._ended.wait(POLL_S)
                continue
            with suppress(IndexError):  # another slot has taken the last one
                order, future = waiting.popleft()
                try:
                    future.set_result(follow(partial(self._step, slot), order, note, epochs))
                except Exception as error:
                    future.set_exception(error)
        slot.end()

    def _step(self, slot: SlotActor, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Runs a step of an order. It has failed if the slot's process has ended.

        Raises:
            CancelledError: the slots are to end.
            NodeRefused: see `Slot.run`.
        """
        if self._ended.is_set():
            raise CancelledError
        running = slot.run(order)
        while not ray.wait([running], timeout=POLL_S)[0]:
            if self._ended.is_set():
                raise CancelledError
        try:
            return ray.get(running)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except ray.exceptions.RayError as error:  # an OutOfMemoryError if Ray's memory monitor has killed it
            return EpochReport(Outcome.FAILED, reason=f"the process of the slot has ended: {error}")


def follow(
    step: Callable[[Order], EpochReport],
    order: Order,
    note: Callable[[Order, EpochReport], None] = lambda order, report: None,
    epochs: int | None = None,
) -> EpochReport:
    """Runs the steps of an order until it ends; returns its last report, with all its epochs.

    Args:
        note: is called after each step, with a report of all epochs so far. An error that it raises ends the order.
        epochs: the most epochs, after which it counts as ended; None for all.
    """
    done: list[EpochFigures] = []
    while True:
        report = step(order)
        # workers that took over report all epochs, also those that had been reported
        done += [figures for figures in report.epochs if figures.epoch > len(done)]
        report = replace(report, epochs=tuple(done[:epochs]))
        note(order, report)
        if report.is_last or len(report.epochs) == epochs:
            return report
