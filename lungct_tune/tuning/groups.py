"""A group of workers: one Ray Train run, whose workers process a slot's orders until there are no more."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from lungct_tune.errors import first_line
from lungct_tune.experiment.trial import EpochReport, TrialOrder
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning.mailbox import ORDER, REPORT
from lungct_tune.tuning.ray_compat import PlacementGroups, worker_errors
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.storage_check import PROBE
from lungct_tune.tuning.workers import OutOfMemory, run_worker

if TYPE_CHECKING:
    from lungct_tune.tuning.retrain import RetrainOrder

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers before it reports an error."""

RELEASE_S = 120
"""How long workers get to save the state of their trial before they are ended."""

END_S = 5.0
"""How long workers whose mailbox is lost get to end with an error of their own."""

HANG_MIN_S, HANG_EPOCHS = 600.0, 50
"""Workers hang if they do not answer for so many seconds, and for so many times their longest epoch so far."""

OUT_OF_MEMORY = (OutOfMemory, ray.exceptions.OutOfMemoryError)
"""Errors of workers that needed more memory than there is, on the GPU or on the node."""


class WorkersLost(RuntimeError):
    """A group of workers ended unexpectedly. The message and the cause say why."""


class MailboxLost(WorkersLost):
    """The mailbox was lost, or the slot has been released. The trial and its workers are not to blame."""


class Group:
    """One Ray Train run whose workers process orders until there are no more."""

    def __init__(self, plan: SlotPlan, name: str, slot: int, avoid: set[str]) -> None:
        """Starts the workers.

        Args:
            name: of the slot.
            slot: its number.
            avoid: ids of nodes on which no worker may start.
        """
        self._plan, self._mailbox, self.avoid = plan, plan.mailbox, avoid
        self.id = f"{_run_name(name)}-{uuid.uuid4().hex[:8]}"
        self._sequence, self._has_reported, self._epoch_s = 0, False, 0.0
        self._error: Exception | None = None
        self._reason = "without an error"
        self._placement_groups = PlacementGroups(self.id)
        # the calls of an actor with asyncio may overtake each other, and orders to a group that is not open are dropped
        with suppress(ray.exceptions.RayError):  # `run` finds out that the mailbox is lost
            ray.get(self._mailbox.open.remote(self.id))
        self._run = threading.Thread(target=self._fit, args=(slot,), daemon=True)
        self._run.start()

    def run(self, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Sends an order to the workers; returns their report.

        Raises:
            WorkersLost: the workers ended instead. It is raised soon after that, whatever the cause.
        """
        self._sequence += 1
        self._mailbox.put.remote((self.id, ORDER, self._sequence), order)
        what = f"{order.what}: {order.hyperparameters}"
        waiting = self._mailbox.get.options(name=what).remote((self.id, REPORT, self._sequence))
        asked = time.monotonic()
        while not ray.wait([waiting], timeout=1)[0]:
            if not self._run.is_alive():
                raise self._loss()
            if isinstance(order, TrialOrder) and self._hangs(time.monotonic() - asked):
                raise WorkersLost(f"the workers have not answered for {time.monotonic() - asked:.0f} s")
        try:
            report: EpochReport = ray.get(waiting)
        except ray.exceptions.RayError as error:  # the mailbox was lost, or the group was released
            self._run.join(timeout=END_S)
            if isinstance(self._error, OUT_OF_MEMORY):
                raise self._loss() from self._error  # Ray's memory monitor first kills what can restart: the mailbox
            raise MailboxLost(f"the slot's mailbox does not answer: {error}") from error
        self._has_reported = True
        self._epoch_s = max([self._epoch_s, *(figures.seconds for figures in report.epochs)])
        return report

    def has_started(self) -> bool:
        """Whether a worker has started; also if the workers have ended since."""
        return not self._run.is_alive() or bool(ray.get(self._mailbox.has_started.remote(self.id)))

    def _hangs(self, silent_s: float) -> bool:
        """Whether workers that are silent so long in a trial hang. Those that have not answered yet may wait for room.

        A retraining is one step, however long, so it is not watched.
        """
        return self._has_reported and silent_s > max(HANG_MIN_S, HANG_EPOCHS * self._epoch_s)

    def release(self, *, lost: bool = False) -> None:
        """Ends the workers. If they do not end in time, their placement group is removed, and they are killed.

        Args:
            lost: whether some of them do not answer. Then none gets time to save a state. The same goes for a group
                that has not answered yet: it may still wait for room.
        """
        if self._has_reported and not lost and self._run.is_alive():
            self._mailbox.put.remote((self.id, ORDER, self._sequence + 1), None)
            self._run.join(timeout=RELEASE_S)
        self._mailbox.close.remote(self.id)
        self._run.join(timeout=10 if self._has_reported else 1)
        if self._run.is_alive():
            self._placement_groups.close()
            remove_placement_groups(self.id)

    def _loss(self) -> Exception:
        loss = WorkersLost(f"the workers ended: {self._reason}")
        loss.__cause__ = self._error
        return loss

    def _fit(self, slot: int) -> None:
        from ray.train import FailureConfig, RunConfig

        from lungct_tune.tuning.ray_trainer import SlotTrainer

        plan = self._plan
        trainer = SlotTrainer(
            run_worker,
            {"plan": plan, "group": self.id, "slot": slot},
            plan.workers,
            plan.resources_per_worker,
            groups=self._placement_groups,
            avoid=self.avoid,
            run_config=RunConfig(
                name=self.id,
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
            errors = worker_errors(error) or [error]
            telling = next((each for each in errors if isinstance(each, (StorageError, *OUT_OF_MEMORY))), None)
            self._error = telling or error
            self._reason = first_line(telling) if telling else "; ".join(dict.fromkeys(map(_last_line, errors)))


def _last_line(error: Exception) -> str:
    """The error itself, where its text has the traceback of a worker before it."""
    return (str(error).strip() or type(error).__name__).rpartition("\n")[2]


def _run_name(slot: str) -> str:
    """How the names of a slot's Train runs and placement groups begin."""
    return slot.replace(" ", "-")


def remove_placement_groups(name: str) -> None:
    """Removes placement groups of groups of workers that nobody will end, and with them their workers.

    Args:
        name: the id of a group, or the name of its slot, or what the names of all slots of a search begin with.
    """
    for group in _placement_groups(name):
        if group["state"] != "REMOVED":
            with suppress(ValueError):  # it has just been removed
                ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def waiting_for_room(name: str) -> int:
    """The number of groups of workers that wait for room on the cluster.

    Args:
        name: what the names of their slots begin with.
    """
    return sum(group["state"] == "PENDING" for group in _placement_groups(name))


def _placement_groups(name: str) -> list[dict[str, Any]]:
    """The placement groups of this job whose names begin so, also those that have been removed."""
    job = ray.get_runtime_context().get_job_id()  # ids of a job's placement groups end with its id
    return [
        group
        for key, group in ray.util.placement_group_table().items()
        if key.endswith(job) and f"{group['name']}-".startswith(f"{_run_name(name)}-")
    ]
