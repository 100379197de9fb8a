"""Groups of Ray Train workers, and the function that each worker of a slot runs.

This module does not import Ray Tune or anything else that a worker does not need. Ray imports it in the process of
every mailbox, every Train controller and every worker.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from lungct_tune.errors import first_line
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.mailbox import DRAIN, ORDER, REPORT
from lungct_tune.tuning.retrain import RetrainOrder, retrain
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.trial_runner import TrialRunner

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers before it reports an error."""

PROBE = ".probe"
"""A file that the head writes to the storage. Every node looks for it and writes a file of its own beside it."""


PROBE_PAUSE_S = 3.0
"""How long a node waits before it tries the storage a second time."""


@dataclass(frozen=True)
class SlotPlan:
    """The configuration of a slot, the same for every slot of a search."""

    experiment: Experiment
    dataset: SharedDataset
    folds: tuple[Fold, ...]
    """One fold, or several: a trial's figures are then means over the folds."""
    workers: int
    resources_per_worker: dict[str, float]
    rungs: tuple[int, ...] = ()
    """The epochs after which early stopping decides about a trial."""
    checkpoint_interval: float = 30.0
    """Seconds of training between two saved states of a trial."""


class OutOfMemory(RuntimeError):
    """A trial needs more memory than its workers have. The message says of what kind."""


def check_from_here(experiment: Experiment) -> None:
    """Checks from this node that it sees the head's file on the storage and can write there. Tries twice.

    Raises:
        NodeRefused: one of these fails.
    """
    try:
        _use_storage(experiment)
    except NodeRefused:  # it may be back in a moment, and NFS shows a file of another host some seconds late
        time.sleep(PROBE_PAUSE_S)
        _use_storage(experiment)


def _use_storage(experiment: Experiment) -> None:
    node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    try:
        seen = experiment.read(PROBE) is not None
        experiment.write(f"{PROBE}-{node}", b"")
    except StorageError as error:
        raise NodeRefused(f"node {address}: {error}") from error
    with suppress(StorageError):
        experiment.delete(f"{PROBE}-{node}")
    if not seen:
        raise NodeRefused(
            f"{experiment.uri}: node {address} and the head do not see each other's files there; "
            "with several nodes --storage must be a shared file system or an object store (s3://, gs://)"
        )


def scaling(workers: int, resources_per_worker: dict[str, float], avoid: Iterable[str] = ()) -> Any:
    """Ray Train's description of a group of workers.

    Args:
        avoid: ids of nodes on which no worker may start.
    """
    from ray.train import ScalingConfig

    gpu = resources_per_worker.get("GPU", 0) > 0
    elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else None
    return ScalingConfig(
        num_workers=workers,
        use_gpu=gpu,
        resources_per_worker=resources_per_worker,
        label_selector=elsewhere,  # type: ignore[call-arg]  # exists in Train V2, but mypy sees V1
    )


def run_worker(config: dict[str, Any]) -> None:
    """Runs a worker of a slot: it takes an order, runs a step of that trial and reports, until there are no orders.

    Args:
        config: "plan" (SlotPlan), "mailbox", "group" (the id of the group of workers) and "slot" (its number).

    Raises:
        NodeRefused: the worker's node cannot use the storage. Such a node may have joined after the search started.
        OutOfMemory: one of several workers has run out of memory; the others would wait for it.
    """
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from lungct_tune.training.trainer import NotFiniteLoss

    plan: SlotPlan = config["plan"]
    mailbox, group = config["mailbox"], config["group"]
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
