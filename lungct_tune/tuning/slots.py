"""Slots: warm groups of Ray Train workers that run one trial after another.

Ray's documented way of combining Tune and Train starts a Train run for every trial: seven processes that
each import their libraries, some 17 s on two cores (measured in benchmarks/further_trial.py). Here one Tune
actor keeps one Train run during the whole search, and its workers get trials, a step at a time, from a
mailbox. Data, pretrained weights, CUDA context and the process group of several workers are set up once for each slot.

A slot of one worker is two processes: the slot's actor, in which the controller of Ray Train runs too, and the worker.
All slots of a job share one mailbox.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import ray
from ray import tune

from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.allocation import workers_that_fit
from lungct_tune.tuning.groups import Group, MailboxLost, WorkersLost, remove_placement_groups
from lungct_tune.tuning.ray_compat import HEAD_NODE
from lungct_tune.tuning.retrain import RetrainOrder
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.storage_check import PROBE
from lungct_tune.tuning.workers import OutOfMemory

ORDER, REPORT = "order", "report"
"""The keys of the `TrialOrder` in Ray Tune's configuration of a trial, and of the `EpochReport` in a result."""

MAX_LOSSES = 3
"""How many groups of workers may be lost over one step of a trial before the trial counts as failed."""

MAX_KILLS = 2
"""How many groups of workers Ray's memory monitor may kill over one step before the trial counts as out of memory.
The monitor kills a node's newest workers, and these may not be the ones that need the memory."""

MAX_TRIALS_LOST = 3
"""How many trials in a row may be lost on a node before it gets no more workers."""

PAUSE_S = 10.0
"""How long a slot waits for a storage before it starts workers again."""

OF_RAY_TRAIN = {
    # groups of workers wait a week for room: the autoscaler starts nodes only for groups that wait
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{7 * 24 * 3600}",
    # a slot learns after so many seconds that its workers were lost
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # saves a process for each group: the driver tells the workers itself that their node will be lost
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment variables of a process that starts groups of workers. On a cluster that a command joins, no actor gets
them from the command's process."""

ON_HEAD = {HEAD_NODE: 0.001}
"""A slot's actor reserves a little of this resource, so it runs on the head. The processes that coordinate its workers
run there too. So every other node may come and go."""


class TuneSlot(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a slot: an actor that Tune reuses for one trial after another.

    A trial's configuration is a `TrialOrder`, and a step is one call of `Slot.run`, whose result has the `EpochReport`.
    """

    def setup(self, config: dict[str, Any], plan: SlotPlan) -> None:  # type: ignore[override]
        # Returns before the workers have started: Tune starts the next slot only after this method returns
        self._order: TrialOrder = config[ORDER]
        self._slot = Slot(plan)

    def __repr__(self) -> str:
        return self._slot.name  # Ray asks once, when the actor is made, and shows it in its dashboard

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._order = new_config[ORDER]
        return True

    def step(self) -> dict[str, Any]:
        try:
            report = self._slot.run(self._order)
        except NodeRefused as refusal:  # not raised: Tune would count it as a failure of the trial and retry
            report = EpochReport(Outcome.REFUSED, reason=str(refusal))
        reached = report.epochs[-1].balanced_accuracy if report.epochs else 0.0
        return {OBJECTIVE: reached, REPORT: report, "done": report.is_last}

    def cleanup(self) -> None:
        self._slot.release()


class Slot:
    """A warm group of workers, replaced when it is lost. A slot is in an actor.

    The workers write a trial's state to the experiment's storage from time to time, and start by reading it. So other
    workers can continue the trial: workers that replace these, or workers of a resumed search.
    """

    def __init__(self, plan: SlotPlan) -> None:
        for name, value in OF_RAY_TRAIN.items():
            os.environ.setdefault(name, value)
        self._plan, self._released, self._lock = plan, threading.Event(), threading.Lock()
        self._mailbox = plan.mailbox
        self._actor = ray.get_runtime_context().current_actor
        self.number: int = ray.get(self._mailbox.take_number.remote(self._actor))
        self.name = f"{plan.slots} {self.number}"
        remove_placement_groups(self.name)  # of a slot with this number that has been killed
        self._group = self._new_group(self._avoided())

    def run(self, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Trains a trial on: to the next rung, to its end, or for about a second. Lost workers are replaced.

        New workers wait without a limit for room: for a new node, or for the end of another slot. They also wait for a
        storage that does not answer.

        Raises:
            NodeRefused: no node is left that can use the storage.
            WorkersLost: the slot has been released.
        """
        losses = kills = 0
        while True:
            try:
                return self._group.run(order)
            except WorkersLost as loss:
                self._group.release(lost=True)
                while not self._mailbox_is_there():
                    if self._released.wait(0.2):
                        raise
                kills += isinstance(loss.__cause__, ray.exceptions.OutOfMemoryError)
                if isinstance(loss.__cause__, OutOfMemory) or kills == MAX_KILLS:
                    outcome, avoid = Outcome.OUT_OF_MEMORY, self._avoided()
                else:
                    counts, avoid = self._examine(order, loss)
                    losses += counts
                    outcome = Outcome.FAILED if losses == MAX_LOSSES else Outcome.RUNNING
                if isinstance(loss.__cause__, StorageError) and self._released.wait(PAUSE_S):
                    raise
                with self._lock:
                    if self._released.is_set():
                        raise
                    self._group = self._new_group(avoid)
                if outcome is not Outcome.RUNNING:
                    return EpochReport(outcome, reason=str(loss))

    def has_workers(self) -> bool:
        """Whether workers have started. If not, `run` may wait for room."""
        return self._group.has_started()

    def release(self) -> None:
        """Ends the workers, after they have saved the state of their trial. A call of `run` gets an error."""
        with self._lock:  # else `run` might start a group of workers after this, and nobody would end them
            self._released.set()
        self._group.release()
        with suppress(ray.exceptions.RayActorError):
            ray.get(self._mailbox.return_number.remote(self.number))

    def _mailbox_is_there(self) -> bool:
        """Asks the mailbox, which Ray may have started again. Such a one has to be told what the slot knows."""
        try:
            ray.get(self._mailbox.take_back.remote(self._actor, self.number, self._group.avoid))
        except ray.exceptions.ActorUnavailableError:
            return False
        return True

    def _examine(self, order: TrialOrder | RetrainOrder, loss: WorkersLost) -> tuple[bool, set[str]]:
        """Finds out what a loss says of the trial and of the nodes, and tells the user.

        A node is left alone if it cannot use the storage while the head can, or if several trials in a row have been
        lost on it, or in one slot there. The last nodes that hold a slot are not left alone. Nothing is counted while
        the storage is away, whatever error it has led to, nor if the node had too little memory.

        Returns:
            Whether the trial may be to blame, and the nodes that get no more workers of this search.

        Raises:
            NodeRefused: no other node is left, and this one cannot use the storage.
        """
        refused = isinstance(loss.__cause__, NodeRefused)
        is_storage = isinstance(loss.__cause__, StorageError)
        is_away = (is_storage and not refused) or not self._head_can_write()
        had_no_memory = isinstance(loss.__cause__, ray.exceptions.OutOfMemoryError)
        counted = None if is_storage or is_away or had_no_memory else order.what
        trials = ray.get(self._mailbox.lose.remote(self._group.id, counted))
        living = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        bad = set() if is_away else {node for node, lost in trials.items() if lost >= MAX_TRIALS_LOST}
        others = [living[node]["Resources"] for node in living.keys() - self._avoided() - bad]
        if bad and workers_that_fit(others, self._plan.resources_per_worker) < self._plan.workers:
            if refused:
                raise loss.__cause__ or loss
            bad = set()
        names = [living[node]["NodeManagerAddress"] for node in bad & living.keys()]
        consequence = f"; {' and '.join(names)} will get no more workers of this search" if names else ""
        waits = f" and starts others in {PAUSE_S:.0f} s" if is_storage else ""
        self._mailbox.warn.remote(f"{order.what} has lost its workers{waits}: {loss}{consequence}")
        node_died = not trials.keys() <= living.keys()
        return counted is not None and not (node_died or isinstance(loss, MailboxLost)), self._avoided(bad)

    def _avoided(self, more: Iterable[str] = ()) -> set[str]:
        """The nodes on which no worker of the search may start any more, after adding some."""
        nodes: set[str] = ray.get(self._mailbox.avoid.remote(set(more)))
        return nodes

    def _head_can_write(self) -> bool:
        try:
            self._plan.experiment.write(PROBE, PROBE.encode())
        except StorageError:
            return False
        return True

    def _new_group(self, avoid: set[str]) -> Group:
        return Group(self._plan, self.name, self.number, avoid)
