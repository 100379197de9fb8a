"""The function that each worker of a slot runs.

This module does not import Ray Tune or anything else that a worker does not need. Ray imports it in the process of
every mailbox, every Train controller and every worker.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from lungct_tune.errors import first_line
from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused
from lungct_tune.tuning.mailbox import DRAIN, ORDER, REPORT
from lungct_tune.tuning.retrain import RetrainOrder, retrain
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.storage_check import check_from_here
from lungct_tune.tuning.trial_runner import TrialRunner

if TYPE_CHECKING:
    import torch


class OutOfMemory(RuntimeError):
    """A trial needs more memory than its workers have. The message says of what kind."""


def run_worker(config: dict[str, Any]) -> None:
    """Runs a worker of a slot: it takes an order, runs a step of that trial and reports, until there are no orders.

    The next step of a trial whose steps are short is trained before it is ordered. It will be, because early stopping
    decides only at rungs. So the GPU does not wait until the report has been to the driver and back.

    Args:
        config: "plan" (SlotPlan), "group" (the id of the group of workers) and "slot" (its number).

    Raises:
        NodeRefused: the worker's node cannot use the storage. Such a node may have joined after the search started.
        OutOfMemory: see `Worker.step`.
    """
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    plan: SlotPlan = config["plan"]
    mailbox, group = plan.mailbox, config["group"]
    node = ray.get_runtime_context().get_node_id()
    mailbox.start.remote(group, node)
    try:
        check_from_here(plan.experiment)
    except NodeRefused:
        ray.get(mailbox.refuse.remote(group, node))
        raise
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    if (device := get_device()).type == "cuda":
        torch.cuda.set_device(device)  # workers with one fold each gather their results there
    worker = Worker(plan, device, config["slot"], drained=mailbox.get.remote((node, DRAIN, 0)))
    for sequence in range(1, 2**62):
        waiting = mailbox.get.remote((group, ORDER, sequence))
        expected = worker.next_order
        report = worker.step(expected) if expected else None
        order: TrialOrder | RetrainOrder | None = ray.get(waiting)
        if order is None:
            worker.close()
            return
        if report is None or order != expected:
            report = worker.step(order)
        if get_context().get_world_rank() == 0:
            ray.get(mailbox.put.remote((group, REPORT, sequence), report))


class Worker:
    """Runs the steps of a worker, of one trial after another.

    Args:
        plan, slot: see `run_worker`.
        drained: is there when the worker's node will be lost.
    """

    def __init__(self, plan: SlotPlan, device: torch.device, slot: int, drained: ray.ObjectRef[None]) -> None:
        self._plan, self._device, self._slot, self._drained = plan, device, slot, drained
        self._trial: TrialRunner | None = None

    @property
    def next_order(self) -> TrialOrder | None:
        """The order that comes next, if it is known already."""
        return self._trial.order if self._trial and self._trial.goes_on else None

    def step(self, order: TrialOrder | RetrainOrder) -> EpochReport:
        """Runs a step of a trial, or a whole retraining.

        Raises:
            OutOfMemory: one of several workers has run out of memory; the others would wait for it.
        """
        import torch

        from lungct_tune.training.trainer import NotFiniteLoss

        try:
            if self._trial is None or self._trial.order != order:
                self._drop()
                _free_memory()
            if isinstance(order, RetrainOrder):
                note_epoch = partial(self._plan.mailbox.note_epoch.remote, order.folder)
                retrain(self._plan, order, self._device, self._must_save, self._warn, note_epoch)
                return EpochReport(Outcome.COMPLETED)
            self._trial = self._trial or TrialRunner(self._plan, order, self._device, self._slot, self._warn)
            return self._trial.run(self._must_save)
        except NotFiniteLoss as error:  # of a retraining, on all workers; a trial reports it itself
            return EpochReport(Outcome.DIVERGED, reason=str(error))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            in_capture = error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else None
            reason = f"{self._device}: {first_line(in_capture or error)}"
            if self._plan.workers > 1 or in_capture:  # the GPU may be unusable
                raise OutOfMemory(reason) from None
            self._drop()
            return EpochReport(Outcome.OUT_OF_MEMORY, reason=reason)

    def close(self) -> None:
        """Saves the state of the trial, if it has not ended."""
        if self._trial is not None:
            self._trial.close()

    def _drop(self) -> None:
        if self._trial is not None:
            self._trial.drop()
        self._trial = None

    def _must_save(self) -> bool:
        return bool(ray.wait([self._drained], timeout=0)[0])

    def _warn(self, sentence: str) -> None:
        self._plan.mailbox.warn.remote(sentence)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error says so; torch has a class of its own for it only on GPUs.

    While a CUDA graph is captured, the end of the capture may raise another error in its place.
    """
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or isinstance(error.__context__, kinds) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    """Frees what is left of the previous trial, also in reference cycles, as those of DistributedDataParallel."""
    import torch

    gc.collect()
    gc.freeze()  # what is left stays; the next collection looks only at what the next trial has made
    torch.cuda.empty_cache()  # does nothing in a worker that has not used a GPU
