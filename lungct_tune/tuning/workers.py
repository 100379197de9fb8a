"""Groups of Ray Train workers, and the function that each worker of a slot runs.

This module does not import Ray Tune or anything else that a worker does not need. Ray imports it in the process of
every mailbox, every Train controller and every worker.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import TrialOrder
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.trial_runner import Fold, TrialRunner

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers before it reports an error."""

PROBE = ".probe"
"""A file that the head writes to the storage. Every node looks for it and writes a file of its own beside it."""


@dataclass(frozen=True)
class SlotPlan:
    """The configuration of a slot, the same for every slot of a search."""

    experiment: Experiment
    dataset: SharedDataset
    folds: tuple[Fold, ...]
    """One fold, or several: a trial's figures are then means over the folds."""
    workers: int
    resources_per_worker: dict[str, float]


class Mailbox:
    """Passes orders from a slot to its workers and reports back, by a sequence number that both sides count."""

    def __init__(self) -> None:
        self._letters: defaultdict[tuple[str, int], asyncio.Future[Any]] = defaultdict(asyncio.Future)

    async def put(self, kind: str, sequence: int, letter: Any) -> None:
        self._letters[kind, sequence].set_result(letter)
        self._letters.pop((kind, sequence - 2), None)  # everybody has read it, else this number would not be reached

    async def get(self, kind: str, sequence: int) -> Any:
        return await asyncio.shield(self._letters[kind, sequence])


def check_from_here(experiment: Experiment) -> None:
    """Checks from this node that it sees the head's file on the storage and can write there.

    Raises:
        NodeRefused: one of these fails.
    """
    node = ray.get_runtime_context().get_node_id()
    try:
        seen = experiment.read(PROBE) is not None
        experiment.write(f"{PROBE}-{node}", b"")
    except StorageError as error:
        raise NodeRefused(f"node {ray.util.get_node_ip_address()}: {error}") from error
    finally:
        with suppress(StorageError):
            experiment.delete(f"{PROBE}-{node}")
    if not seen:
        raise NodeRefused(
            f"{experiment.uri}: node {ray.util.get_node_ip_address()} and the head do not see each other's files "
            "there; with several nodes --storage must be a shared file system or an object store (s3://, gs://)"
        )


def scaling(workers: int, resources_per_worker: dict[str, float]) -> Any:
    """Ray Train's description of a group of workers."""
    from ray.train import ScalingConfig

    gpu = resources_per_worker.get("GPU", 0) > 0
    return ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources_per_worker)


def run_worker(config: dict[str, Any]) -> None:
    """Runs a worker of a slot: it takes an order, runs an epoch of that trial and reports, until there are no orders.

    Raises:
        NodeRefused: the worker's node cannot use the storage. Such a node may have joined after the search started.
    """
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    plan, mailbox = config["plan"], config["mailbox"]
    check_from_here(plan.experiment)
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    if (device := get_device()).type == "cuda":
        torch.cuda.set_device(device)  # workers with one fold each gather their results there
    is_first = get_context().get_world_rank() == 0
    trial: TrialRunner | None = None
    for sequence in range(1, 2**62):
        order: TrialOrder | None = ray.get(mailbox.get.remote("order", sequence))
        if order is None:
            return
        if trial is None or trial.number != order.number:
            trial = None  # frees the previous model's memory before the next model is made
            trial = TrialRunner(plan.experiment, plan.dataset, plan.folds, order, device)
        report = trial.run_epoch()
        if is_first:
            ray.get(mailbox.put.remote("report", sequence, report))
