"""The function that each worker of a slot runs.

This module does not import Ray Tune or anything else that a worker does not need. Ray imports it in the process of
every mailbox, every Train controller and every worker.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import ray

from lungct_tune.errors import first_line
from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused
from lungct_tune.tuning.mailbox import DRAIN, ORDER, REPORT
from lungct_tune.tuning.retrain import RetrainOrder, retrain
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.storage_check import check_from_here
from lungct_tune.tuning.trial_runner import TrialRunner


class OutOfMemory(RuntimeError):
    """A trial needs more memory than its workers have. The message says of what kind."""


def run_worker(config: dict[str, Any]) -> None:
    """Runs a worker of a slot: it takes an order, runs a step of that trial and reports, until there are no orders.

    Args:
        config: "plan" (SlotPlan), "group" (the id of the group of workers) and "slot" (its number).

    Raises:
        NodeRefused: the worker's node cannot use the storage. Such a node may have joined after the search started.
        OutOfMemory: one of several workers has run out of memory; the others would wait for it.
    """
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from lungct_tune.training.trainer import NotFiniteLoss

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
    is_first = get_context().get_world_rank() == 0
    drain = mailbox.get.remote((node, DRAIN, 0))

    def must_save() -> bool:
        return bool(ray.wait([drain], timeout=0)[0])

    def warn(sentence: str) -> None:
        mailbox.warn.remote(sentence)

    trial: TrialRunner | None = None
    for sequence in range(1, 2**62):
        order: TrialOrder | RetrainOrder | None = ray.get(mailbox.get.remote((group, ORDER, sequence)))
        if order is None:
            if trial is not None:
                trial.close()
            return
        try:
            if trial is None or trial.order != order:
                if trial is not None:
                    trial.drop()
                trial = None
                _free_memory()
            if isinstance(order, RetrainOrder):
                retrain(plan, order, device, must_save, warn, partial(mailbox.note_epoch.remote, order.folder))
                report = EpochReport(Outcome.COMPLETED)
            else:
                trial = trial or TrialRunner(plan, order, device, config["slot"], warn)
                report = trial.run(must_save)
        except NotFiniteLoss as error:  # of a retraining, on all workers; a trial reports it itself
            report = EpochReport(Outcome.DIVERGED, reason=str(error))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            in_capture = error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else None
            reason = f"{device}: {first_line(in_capture or error)}"
            if plan.workers > 1 or in_capture:  # the GPU may be unusable
                raise OutOfMemory(reason) from None
            if trial is not None:
                trial.drop()
            trial, report = None, EpochReport(Outcome.OUT_OF_MEMORY, reason=reason)
        if is_first:
            ray.get(mailbox.put.remote((group, REPORT, sequence), report))


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
