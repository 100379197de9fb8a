"""Slots: warm groups of Ray Train workers that run one trial after another.

Ray's documented way of combining Tune and Train starts a Train run for every trial: seven processes that
each import their libraries, some 17 s on two cores (measured in benchmarks/further_trial.py). Here one Tune
actor keeps one Train run during the whole search, and its workers get trials, an epoch at a time, from a
mailbox. Data, pretrained weights, process group and CUDA context are set up once for each slot.
"""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.exceptions import ActorAlreadyExistsError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.ray_compat import HEAD_NODE
from lungct_tune.tuning.workers import PROBE, START_ATTEMPTS, Mailbox, SlotPlan, run_worker

REPORT = "report"
"""The key of the `EpochReport` in a result of Ray Tune."""

MAX_LOSSES = 3
"""How many groups of workers may be lost over one epoch of a trial before the trial counts as failed."""

ON_HEAD = {HEAD_NODE: 0.001}
"""A slot's actor reserves a little of this resource, so it runs on the head. The processes that coordinate its workers
run there too. So every other node may come and go."""


class WorkersLost(RuntimeError):
    """A group of workers ended unexpectedly. The message says why."""


class TuneSlot(tune.Trainable):  # type: ignore[misc]
    """Ray Tune's side of a slot: an actor that Tune reuses for one trial after another.

    A trial's configuration is a `TrialOrder` as a dictionary, and a step is one epoch. The result of a step has the
    figures for Tune's loggers, and under `REPORT` the `EpochReport` for the other code.
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
            report = self._slot.run_epoch(self._order)
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

    The workers write a trial's state to the experiment's storage after every epoch, and start by reading it. So other
    workers can continue the trial: workers that replace these, or workers of a resumed search.
    """

    def __init__(self, plan: SlotPlan) -> None:
        # saves a process for each group: the notice that a node will be lost would not end an epoch any sooner
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        self._plan, self._released = plan, False
        self._group = Group(plan)

    @property
    def name(self) -> str:
        return self._group.name

    def run_epoch(self, order: TrialOrder) -> EpochReport:
        """Runs the trial's next epoch on the workers. Lost workers are replaced.

        New workers wait without a limit for room: for a new node, or for the end of another slot.

        Raises:
            NodeRefused: workers started on a node that cannot use the storage.
        """
        for _ in range(MAX_LOSSES):
            try:
                return self._group.run_epoch(order).of_slot(self._group.number)
            except WorkersLost as loss:
                if self._released:
                    raise
                reason = str(loss)
                self._group.release()
                self._group = Group(self._plan)
        return EpochReport(Outcome.FAILED, reason=reason)

    def release(self) -> None:
        """Ends the workers. A call of `run_epoch` that waits for them gets an error."""
        self._released = True
        self._group.release()


class Group:
    """One Ray Train run whose workers process orders until there are no more."""

    def __init__(self, plan: SlotPlan) -> None:
        self._sequence, self._has_reported = 0, False
        self._error: Exception | None = None
        self.number, self._mailbox = _numbered_mailbox(plan.experiment.name)
        self.name = slot_name(plan.experiment.name, self.number)
        self._run = threading.Thread(target=self._fit, args=(plan,), daemon=True)
        self._run.start()

    def run_epoch(self, order: TrialOrder) -> EpochReport:
        """Sends an order to the workers; returns their report.

        Raises:
            WorkersLost: the workers ended instead. It is raised soon after that, whatever the cause.
            NodeRefused: the workers ended because the node of one of them cannot use the storage.
        """
        self._sequence += 1
        self._mailbox.put.remote("order", self._sequence, order)
        what = f"trial {order.number}: {order.hyperparameters}"
        waiting = self._mailbox.get.options(name=what).remote("report", self._sequence)
        while not ray.wait([waiting], timeout=1)[0]:
            if not self._run.is_alive():
                if isinstance(self._error, NodeRefused):
                    raise self._error
                raise WorkersLost(f"the workers ended: {self._error or 'without an error'}") from self._error
        report: EpochReport = ray.get(waiting)
        self._has_reported = True
        return report

    def release(self) -> None:
        """Ends the workers. If they do not end in time, the mailbox is killed, which ends their run.

        It is killed at once if the workers have not finished an epoch yet. A run that waits for room does not notice;
        it ends with this process.
        """
        if self._has_reported:
            self._mailbox.put.remote("order", self._sequence + 1, None)
            self._run.join(timeout=10)
        ray.kill(self._mailbox)
        self._run.join(timeout=10 if self._has_reported else 1)

    def _fit(self, plan: SlotPlan) -> None:
        from ray.train import FailureConfig, RunConfig

        from lungct_tune.tuning.ray_trainer import GroupTrainer

        trainer = GroupTrainer(
            run_worker,
            {"plan": plan, "mailbox": self._mailbox},
            plan.workers,
            plan.resources_per_worker,
            RunConfig(
                name=f"{self.name.replace(' ', '-')}-{uuid.uuid4().hex[:8]}",
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
        except Exception as error:  # kept for run_epoch(), which raises it in the slot's thread
            of_workers = getattr(error, "worker_failures", {}).values()
            self._error = next((each for each in of_workers if isinstance(each, NodeRefused)), error)


def slot_name(search: str, number: int) -> str:
    """The name of a slot in Ray's dashboard."""
    return f"{search} slot {number}"


def _numbered_mailbox(search: str) -> tuple[int, Any]:
    """The lowest number that no other slot of the search has now, and a mailbox that reserves the number.

    The number is in the mailbox's name, and Ray does not allow two living actors with the same name.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    number = 1
    while True:
        try:
            return number, ray.remote(Mailbox).options(name=slot_name(search, number), **options).remote()
        except ActorAlreadyExistsError:
            number += 1


def waiting_for_room(plan: SlotPlan) -> int:
    """The number of this search's groups of workers that wait for room on the cluster."""
    shape = [plan.resources_per_worker] * plan.workers
    job = ray.get_runtime_context().get_job_id()  # ids of the search's placement groups end with it
    return sum(
        key.endswith(job) and group["state"] == "PENDING" and list(group["bundles"].values()) == shape
        for key, group in ray.util.placement_group_table().items()
    )
