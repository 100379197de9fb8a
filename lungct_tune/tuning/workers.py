"""Groups of Ray Train workers, and what each worker of a slot does.

Kept apart from Ray Tune and from all that a worker does not need: Ray imports this in the process of every mailbox,
of every Train controller and of every worker.
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
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.trial_runner import Fold, TrialRunner

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers, before one that cannot start is an error."""

PROBE = ".probe"
"""What the head writes where the search keeps its files, for every node to find; the nodes write files beside it."""


class NodeRefused(StorageError):
    """A node cannot use the search's storage, nor would it for another trial: the message names it."""


@dataclass(frozen=True)
class SlotPlan:
    """All that a slot needs to know: the same for every slot of a search."""

    experiment: Experiment
    dataset: SharedDataset
    folds: tuple[Fold, ...]
    """One, or several whose mean is what a trial is worth."""
    workers: int
    resources_per_worker: dict[str, float]


class Mailbox:
    """Where a slot leaves orders and its workers leave reports, by a sequence number that both count."""

    def __init__(self) -> None:
        self._letters: defaultdict[tuple[str, int], asyncio.Future[Any]] = defaultdict(asyncio.Future)

    async def put(self, kind: str, sequence: int, letter: Any) -> None:
        self._letters[kind, sequence].set_result(letter)
        self._letters.pop((kind, sequence - 2), None)  # everybody has read it, or nobody would have come this far

    async def get(self, kind: str, sequence: int) -> Any:
        return await asyncio.shield(self._letters[kind, sequence])


def check_from_here(experiment: Experiment) -> None:
    """Looks from this node for what the head wrote on the storage, and writes there.

    Raises:
        NodeRefused: one of them cannot be done.
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
    """A worker's life in a slot: take an order, run an epoch of that trial, report, until there is no order.

    Raises:
        NodeRefused: it runs on a node that may have come since the search began, and cannot use its storage.
    """
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    plan, mailbox = config["plan"], config["mailbox"]
    check_from_here(plan.experiment)
    torch.set_num_threads(max(1, int(plan.resources_per_worker["CPU"])))
    if (device := get_device()).type == "cuda":
        torch.cuda.set_device(device)  # where workers that train a fold each gather what they say
    is_first = get_context().get_world_rank() == 0
    trial: TrialRunner | None = None
    for sequence in range(1, 2**62):
        order: TrialOrder | None = ray.get(mailbox.get.remote("order", sequence))
        if order is None:
            return
        if trial is None or trial.number != order.number:
            trial = None  # the model that was is gone before the next one comes
            trial = TrialRunner(plan.experiment, plan.dataset, plan.folds, order, device)
        report = trial.run_epoch()
        if is_first:
            ray.get(mailbox.put.remote("report", sequence, report))
