"""Divides a cluster: how many slots its nodes have room for, and how many workers a final retraining gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lungct_tune.errors import UserError, number_of
from lungct_tune.tuning.ray_compat import HEAD_NODE

if TYPE_CHECKING:
    from lungct_tune.config.settings import Settings


class ClusterError(UserError):
    """The cluster cannot be reached or is too small. The message says what it has and what to do."""


HEAD_MEMORY_OF_SLOT = 0.13 * 2**30
"""Bytes of the head's memory for each slot of one worker: its actor, with Ray Tune and Ray Train, had 121 MiB that it
shares with no other process (psutil's uss). A slot's workers need memory of their own, on their own nodes."""

HEAD_MEMORY_OF_GROUP = 0.4 * 2**30
"""The same for a slot of several workers: its actor imports torch too, and had 389 MiB."""


@dataclass(frozen=True)
class ResourcePlan:
    """How a search, or its final retrainings, divide a cluster into slots."""

    slots: int
    workers: int
    resources_per_worker: dict[str, float]
    capacity: int
    """How many slots the present nodes have room for; the others wait for nodes."""

    @property
    def head_memory_each(self) -> float:
        """Bytes that each slot needs on the head."""
        return HEAD_MEMORY_OF_SLOT if self.workers == 1 else HEAD_MEMORY_OF_GROUP

    @property
    def head_memory(self) -> float:
        """Bytes that the slots need on the head."""
        return self.slots * self.head_memory_each

    @property
    def slot(self) -> str:
        """The workers of a slot, as text."""
        return f"{number_of(self.workers, 'worker')} with {describe_resources(self.resources_per_worker)} each"

    def __str__(self) -> str:
        waiting = f" (room for {min(self.capacity, self.slots)} now; the others start as nodes come)"
        return f"{number_of(self.slots, 'slot')} of {self.slot}{waiting if self.capacity < self.slots else ''}"


def describe_resources(resources: Mapping[str, float]) -> str:
    """Resources as text, such as "1 CPU and 0.5 GPU"."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def workers_of(config: Mapping[str, Any]) -> Sequence[Mapping[str, float]] | None:
    """The resources of the worker nodes that an autoscaler's configuration allows, those with most GPUs first.

    None if the configuration does not give the resources of a node type. Source: https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html
    """
    nodes: list[Mapping[str, float]] = []
    for kind in config["available_node_types"].values():
        if most := kind.get("max_workers", 0):  # the head's type may have workers too
            if "CPU" not in kind.get("resources", {}):
                return None
            nodes += [kind["resources"]] * most
    nodes.sort(key=lambda node: (node.get("GPU", 0), node["CPU"]), reverse=True)
    return nodes[: config.get("max_workers", len(nodes))]


def divide(
    settings: Settings, nodes: Sequence[Mapping[str, float]], to_come: Sequence[Mapping[str, float]] | None
) -> ResourcePlan:
    """The slots for which a cluster has room now or can grow; `settings.slots` and others override the defaults.

    Args:
        nodes, to_come: the two parts of `cluster_nodes`.

    Raises:
        ClusterError: there will never be room for one slot, or for the number that the settings ask for; or the head
            has too little memory for its part of the slots.
    """
    each = _each(settings, nodes, to_come)
    now, most = workers_that_fit(nodes, each), _most_workers(nodes, to_come, each)
    slots = settings.slots or max(1, most // settings.workers)
    if to_come is not None and most < slots * settings.workers:
        have = "; ".join(describe_resources({kind: node.get(kind, 0) for kind in ("CPU", "GPU")}) for node in nodes)
        grown = f", and {most} with all the nodes that its autoscaler may bring" if to_come else ""
        raise ClusterError(
            f"{number_of(slots, 'slot')} of {number_of(settings.workers, 'worker')} do not fit: a worker needs "
            f"{describe_resources(each)} on one node, so the cluster holds {now} workers{grown}, and "
            f"{slots * settings.workers} are needed. It has {number_of(len(nodes), 'node')}: {have}. Lower --slots, "
            "--workers, --cpus-per-worker or --gpus-per-worker, or give the cluster more nodes."
        )
    plan = ResourcePlan(min(slots, settings.trials or slots), settings.workers, each, now // settings.workers)
    _check_head(plan, nodes)
    return plan


def _check_head(plan: ResourcePlan, nodes: Sequence[Mapping[str, float]]) -> None:
    """Checks that the head has memory for its part of every slot.

    Raises:
        ClusterError: it has less.
    """
    memory = next((node["memory"] for node in nodes if HEAD_NODE in node and "memory" in node), None)
    if memory is not None and plan.head_memory > memory:
        raise ClusterError(
            f"{number_of(plan.slots, 'slot')} need {plan.head_memory / 2**30:.1f} GiB of the head's memory, "
            f"{plan.head_memory_each / 2**30:.2f} GiB each, and Ray has {memory / 2**30:.1f} GiB there. "
            f"Give --slots {max(1, int(memory / plan.head_memory_each + 1e-9))}, or a head with more memory."
        )


def divide_for_retraining(
    settings: Settings, nodes: Sequence[Mapping[str, float]], to_come: Sequence[Mapping[str, float]] | None
) -> ResourcePlan:
    """The slots of the final retrainings, on the same nodes as for `divide`.

    By default as many workers as a slot has; with folds one, because a slot's workers then train a fold each. More
    workers seldom pay: a batch of 32 images takes a GPU some ms, and two nodes with 10 Gb/s between them 60 ms to add
    up the gradients of the whole ResNet50.

    Raises:
        ClusterError: there will never be room for the number that the settings ask for.
    """
    each = _each(settings, nodes, to_come)
    asked = settings.final_workers
    workers = asked or (1 if settings.cross_validates else settings.workers)
    if workers > 1 and "GPU" in each:  # all workers are one group, and NCCL does not allow two of a group on one GPU
        each["GPU"] = max(1.0, each["GPU"])
    most = _most_workers(nodes, to_come, each)
    batch = settings.batch_size or 2 * workers
    too_many = to_come is not None and workers > most
    if asked and (too_many or batch % asked or batch // asked < 2):
        raise ClusterError(
            f"--final-workers {asked} is not possible: the cluster holds {most} workers, and "
            f"the batch of {batch} images must divide evenly among them, two or more for each"
        )
    slots = max(1, most // workers)
    if to_come is None:  # nodes may come, as for the search
        slots = max(slots, settings.slots or 1)
    return ResourcePlan(slots, workers, each, capacity=workers_that_fit(nodes, each) // workers)


def _each(
    settings: Settings, nodes: Sequence[Mapping[str, float]], to_come: Sequence[Mapping[str, float]] | None
) -> dict[str, float]:
    """The resources that a worker reserves."""
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in [*nodes, *(to_come or ())]) else 0.0
    return {"CPU": settings.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def _most_workers(
    nodes: Sequence[Mapping[str, float]], to_come: Sequence[Mapping[str, float]] | None, each: Mapping[str, float]
) -> int:
    """How many workers will ever fit. `to_come` includes worker nodes that have already started, but not the head."""
    head = [node for node in nodes if HEAD_NODE in node]
    return max(workers_that_fit(nodes, each), workers_that_fit([*head, *(to_come or ())], each))


def workers_that_fit(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers fit. A group may span nodes, but a worker must be on one node, and a GPU fraction on one GPU."""

    def on(node: Mapping[str, float], kind: str, amount: float) -> int:
        if kind == "GPU" and amount < 1:
            part, whole = math.modf(node.get(kind, 0) + 1e-9)
            return int(whole) * int(1 / amount + 1e-9) + int(part / amount + 1e-9)
        return int(node.get(kind, 0) / amount + 1e-9)

    return sum(min(on(node, kind, amount) for kind, amount in each.items()) for node in nodes)
