"""Slots: warm groups of Ray Train workers that run one trial after another.

Ray's documented way of combining Tune and Train starts a Train run for every trial: seven processes that
each import their libraries, some 17 s on two cores (measured in benchmarks/further_trial.py). Here one Tune
actor keeps one Train run during the whole search, and its workers get trials, a step at a time, from a
mailbox. Data, pretrained weights, process group and CUDA context are set up once for each slot.

A slot of one worker is two processes: the slot's actor, in which the controller of Ray Train runs too, and the worker.
All slots share one mailbox.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import tune

from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.mailbox import ORDER, open_mailbox
from lungct_tune.tuning.mailbox import REPORT as REPORTED
from lungct_tune.tuning.ray_compat import HEAD_NODE
from lungct_tune.tuning.retrain import RetrainOrder
from lungct_tune.tuning.workers import PROBE, START_ATTEMPTS, OutOfMemory, SlotPlan, run_worker

REPORT = "report"
"""The key of the `EpochReport` in a result of Ray Tune."""

MAX_LOSSES = 3
"""How many groups of workers may be lost over one step of a trial before the trial counts as failed."""

RELEASE_S = 120
"""How long workers get to save the state of their trial before they are ended."""

OUT_OF_MEMORY = (OutOfMemory, ray.exceptions.OutOfMemoryError)
"""Errors of workers that needed more memory than there is, on the GPU or on the node."""

ON_HEAD = {HEAD_NODE: 0.001}
"""A slot's actor reserves a little of this resource, so it runs on the head. The processes that coordinate its workers
run there too. So every other node may come and go."""


class WorkersLost(RuntimeError):
    """A group of workers ended unexpectedly. The message says why."""

    out_of_memory = False


class MailboxLost(WorkersLost):
    """The mailbox was lost, or the slot has been released. It is not the fault of the trial."""


class TuneSlot(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a slot: an actor that Tune reuses for one trial after another.

    A trial's configuration is a `TrialOrder` as a dictionary, and a step is one call of `Slot.run`. The result of a
    step has the figures of its last epoch for Tune's loggers, and under `REPORT` the `EpochReport` for the other code.
    """

    def setup(self, config: dict[str, Any], plan: SlotPlan) -> None:  # type: ignore[override]
        # Returns before the workers have started: Tune starts the next slot only after this method returns
        self._order, self._slot = TrialOrder.from_dict(config), Slot(plan)

    def __repr__(self) -> str:
        return self._slot.name  # Ray asks once, when the actor is made, and shows it in its dashboard

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._order = TrialOrder.from_dict(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            report = self._slot.run(self._order)
        except NodeRefused as refusal:  # not raised: Tune would count it as a failure of the trial and retry
            report = EpochReport(Outcome.REFUSED, reason=str(refusal))
        result: dict[str, Any] = {OBJECTIVE: 0.0, REPORT: report, "done": report.is_last}
        if report.epochs:
            last = report.epochs[-1]
            # Tune's own iteration, by which its loggers count, would restart at 1 when an interrupted trial continues
            result |= last.as_dict() | {"training_iteration": last.epoch}
        return result | (asdict(report.cost) if report.cost else {})

    def cleanup(self) -> None:
        self._slot.release()


class Slot:
    """A warm group of workers, replaced when it is lost.

    The workers write a trial's state to the experiment's storage from time to time, and start by reading it. So other
    workers can continue the trial: workers that replace these, or workers of a resumed search.
    """

    def __init__(self, plan: SlotPlan, search: str = "") -> None:
        # saves a process for each group: the driver tells the workers itself that their node will be lost
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        self._plan, self._released, self._lock = plan, False, threading.Lock()
        search = search or plan.experiment.name
        self._mailbox = open_mailbox(search)
        context = ray.get_runtime_context()
        self._actor = context.current_actor if context.get_actor_id() else None
        self.number: int = ray.get(self._mailbox.take_number.remote(self._actor))
        self.name = f"{search} slot {self.number}"
        remove_placement_groups(self.name)  # of a slot with this number that has been killed
        self._group = self._new_group()

    def run(self, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Trains a trial on: to the next rung, to its end, or for about a second. Lost workers are replaced.

        New workers wait without a limit for room: for a new node, or for the end of another slot.

        Raises:
            NodeRefused: workers started on a node that cannot use the storage.
            WorkersLost: the slot has been released.
        """
        losses = 0
        while losses < MAX_LOSSES:
            try:
                return self._group.run(order)
            except WorkersLost as loss:
                if loss.out_of_memory:
                    self._replace_group(loss)
                    return EpochReport(Outcome.OUT_OF_MEMORY, reason=str(loss))
                reason = str(loss)
                losses += not isinstance(loss, MailboxLost)
                self._replace_group(loss)
        return EpochReport(Outcome.FAILED, reason=reason)

    def release(self) -> None:
        """Ends the workers, after they have saved the state of their trial. A call of `run` gets an error."""
        with self._lock:  # else `run` might start a group of workers after this, and nobody would end them
            self._released = True
        self._group.release()
        with suppress(ray.exceptions.RayActorError):
            ray.get(self._mailbox.return_number.remote(self.number))

    def _replace_group(self, loss: WorkersLost) -> None:
        self._group.release()
        while not self._mailbox_is_there() and not self._released:
            time.sleep(0.2)
        with self._lock:
            if self._released:
                raise loss
            self._group = self._new_group()

    def _mailbox_is_there(self) -> bool:
        """Asks a mailbox that Ray may have started again. Such a one has to be told the slot's number."""
        try:
            ray.get(self._mailbox.keep_number.remote(self._actor, self.number))
        except ray.exceptions.ActorUnavailableError:
            return False
        return True

    def _new_group(self) -> Group:
        return Group(self._plan, self.name, self.number, self._mailbox)


class Group:
    """One Ray Train run whose workers process orders until there are no more."""

    def __init__(self, plan: SlotPlan, name: str, slot: int, mailbox: Any) -> None:
        self._plan, self._mailbox = plan, mailbox
        self._id = f"{_run_name(name)}-{uuid.uuid4().hex[:8]}"
        self._sequence, self._has_reported = 0, False
        self._error: Exception | None = None
        mailbox.open.remote(self._id)
        self._run = threading.Thread(target=self._fit, args=(slot,), daemon=True)
        self._run.start()

    def run(self, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Sends an order to the workers; returns their report.

        Raises:
            WorkersLost: the workers ended instead. It is raised soon after that, whatever the cause.
            NodeRefused: the workers ended because the node of one of them cannot use the storage.
        """
        self._sequence += 1
        self._mailbox.put.remote((self._id, ORDER, self._sequence), order)
        what = f"trial {order.number}: {order.hyperparameters}"
        waiting = self._mailbox.get.options(name=what).remote((self._id, REPORTED, self._sequence))
        while not ray.wait([waiting], timeout=1)[0]:
            if not self._run.is_alive():
                raise self._loss()
        try:
            report: EpochReport = ray.get(waiting)
        except ray.exceptions.RayError as error:  # the mailbox was lost, or the group was released
            raise MailboxLost(f"the slot's mailbox does not answer: {error}") from error
        self._has_reported = True
        return report

    def release(self) -> None:
        """Ends the workers, with an error if they do not end in time.

        A group that has not answered yet may still wait for room. It gets no time.
        """
        if self._has_reported and self._run.is_alive():
            self._mailbox.put.remote((self._id, ORDER, self._sequence + 1), None)
            self._run.join(timeout=RELEASE_S)
        self._mailbox.close.remote(self._id)
        self._run.join(timeout=10 if self._has_reported else 1)

    def _loss(self) -> Exception:
        if isinstance(self._error, NodeRefused):
            return self._error
        loss = WorkersLost(f"the workers ended: {self._error or 'without an error'}")
        loss.out_of_memory = isinstance(self._error, OUT_OF_MEMORY)
        loss.__cause__ = self._error
        return loss

    def _fit(self, slot: int) -> None:
        from ray.train import FailureConfig, RunConfig

        from lungct_tune.tuning.ray_trainer import GroupTrainer, SlotTrainer

        plan = self._plan
        in_actor = ray.get_runtime_context().get_actor_id() is not None
        trainer = (SlotTrainer if in_actor else GroupTrainer)(
            run_worker,
            {"plan": plan, "mailbox": self._mailbox, "group": self._id, "slot": slot},
            plan.workers,
            plan.resources_per_worker,
            RunConfig(
                name=self._id,
                storage_path=f"{plan.experiment.root}/slots",
                storage_filesystem=plan.experiment.filesystem,
                # only the slot recovers from failures: a group that loses a worker ends, and the slot makes a new one
                failure_config=FailureConfig(  # type: ignore[call-arg]
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=START_ATTEMPTS
                ),
            ),
        )
        try:
            plan.experiment.write(PROBE, PROBE.encode())
            trainer.fit()
        except Exception as error:  # kept for run(), which raises it in the slot's thread
            of_workers = list(getattr(error, "worker_failures", {}).values())
            self._error = next((each for each in of_workers if isinstance(each, (NodeRefused, *OUT_OF_MEMORY))), error)


def _run_name(slot: str) -> str:
    """How the names of a slot's Train runs and placement groups begin."""
    return slot.replace(" ", "-")


def remove_placement_groups(slots: str) -> None:
    """Removes the placement groups of slots that have been killed, and with them their workers.

    Args:
        slots: the name of a slot, or what the names of all slots of a search begin with.
    """
    job = ray.get_runtime_context().get_job_id()
    for key, group in ray.util.placement_group_table().items():
        left = group["state"] != "REMOVED" and group["name"].startswith(f"{_run_name(slots)}-")
        if left and key.endswith(job):  # ids of a job's placement groups end with its id
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def waiting_for_room(plan: SlotPlan) -> int:
    """The number of this search's groups of workers that wait for room on the cluster."""
    shape = [plan.resources_per_worker] * plan.workers
    job = ray.get_runtime_context().get_job_id()  # ids of the search's placement groups end with it
    return sum(
        key.endswith(job) and group["state"] == "PENDING" and list(group["bundles"].values()) == shape
        for key, group in ray.util.placement_group_table().items()
    )
