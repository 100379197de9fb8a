"""The Ray cluster: connecting to it, what it has, and whether what is asked for fits."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.experiment import Experiment, StorageError
from lungct_tune.settings import Settings


class ClusterError(RuntimeError):
    """The cluster cannot be reached or cannot hold what is asked: the message says what there is and what to do."""


FINAL_SHARE = 16
"""Images of a step that a worker of the final retraining gets at least, unless the user says how many workers."""


@dataclass(frozen=True)
class Allotment:
    """How a search divides a cluster."""

    slots: int
    workers: int
    resources_per_worker: dict[str, float]
    final_workers: int
    final_resources_per_worker: dict[str, float]

    def __str__(self) -> str:
        return (
            f"{_count(self.slots, 'slot')} of {_count(self.workers, 'worker')} with "
            f"{_amounts(self.resources_per_worker)} each; the final retraining on "
            f"{_count(self.final_workers, 'worker')} with {_amounts(self.final_resources_per_worker)} each"
        )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def connect(address: str | None, verbose: bool) -> str:
    """Joins the cluster at `address`, else the one at hand, else starts one on this machine.

    Returns:
        The address of Ray's dashboard, or an empty string where there is none.

    Raises:
        ClusterError: there is no cluster at `address`, or not one that Tune can use from here.
    """
    if address and address.startswith("ray://"):
        raise ClusterError(
            f"--address {address}: Ray Tune does not run through Ray's client; give the head's HOST:PORT (6379) on a "
            "node of the cluster, or send the command there with `ray job submit`"
        )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "0"  # run_search listens to that handler for Ctrl-C
    # Trials find their files by absolute paths; a process that changes its folder breaks the user's relative ones
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # a slot is some seven processes, most of them idle: more than CPUs start at once, and Ray warns of it
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(4 * (os.cpu_count() or 1)))
    if not verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new reporter speaks at verbose=0 too
        # a trial's failure is reported by the search itself, in a line; Ray's traces are in its log files
        logging.getLogger("ray").setLevel(logging.CRITICAL)
    at = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = at.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself tries for minutes before it says so
            socket.create_connection((host, int(port)), timeout=10).close()
        context = ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.CRITICAL,
            ignore_reinit_error=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {at}" if at else "at hand (the last one started here)"
        raise ClusterError(
            f"the Ray cluster {where} cannot be joined: {error}\n"
            "Check that it runs (`ray status`) and that RAY_AUTH_MODE is the same here as there, "
            "or unset RAY_ADDRESS and leave --address out to start one on this machine."
        ) from error
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


def allot(settings: Settings) -> Allotment:
    """Slots and workers that the cluster at hand holds, by the settings where they say.

    Raises:
        ClusterError: not even one slot fits, or fewer than asked.
    """
    return divide(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def divide(settings: Settings, nodes: Sequence[Mapping[str, float]]) -> Allotment:
    """`allot` for a cluster of these nodes' resources.

    Raises:
        ClusterError: not even one slot fits, or fewer than asked.
    """
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    each = {"CPU": settings.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    fits = _workers_that_fit(nodes, each)
    slots = settings.slots or max(1, fits // settings.workers)
    if fits < slots * settings.workers:
        have = "; ".join(_amounts({kind: node.get(kind, 0) for kind in ("CPU", "GPU")}) for node in nodes)
        raise ClusterError(
            f"{_count(slots, 'slot')} of {_count(settings.workers, 'worker')} do not fit: a worker needs "
            f"{_amounts(each)} on one node, so the cluster holds {fits} workers, and {slots * settings.workers} are "
            f"needed. It has {_count(len(nodes), 'node')}: {have}. Lower --slots, --workers, --cpus-per-worker or "
            "--gpus-per-worker, or give the cluster more nodes."
        )
    # the retraining's workers are one group, and NCCL takes no two of a group on one GPU
    final_each = each | ({"GPU": max(1.0, gpus)} if gpus else {})
    final = _final_workers(settings, _workers_that_fit(nodes, final_each))
    return Allotment(min(slots, settings.trials or slots), settings.workers, each, final, final_each)


def _workers_that_fit(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """A group of workers may span nodes; a worker may not, nor may a fraction of a GPU span GPUs."""

    def on(node: Mapping[str, float], kind: str, amount: float) -> int:
        if kind == "GPU" and amount < 1:
            return int(node.get(kind, 0)) * int(1 / amount + 1e-9)
        return int(node.get(kind, 0) / amount + 1e-9)

    return sum(min(on(node, kind, amount) for kind, amount in each.items()) for node in nodes)


def _final_workers(settings: Settings, fits: int) -> int:
    """Workers of the final retraining: as asked, else all that share a batch evenly, with enough for their norms."""
    batch = settings.batch_size or 1
    shares = [n for n in range(1, fits + 1) if batch % n == 0]
    if settings.final_workers is None:
        return max((n for n in shares if batch // n >= FINAL_SHARE), default=1)
    if settings.final_workers not in shares or batch // settings.final_workers < 2:
        raise ClusterError(
            f"--final-workers {settings.final_workers} cannot be: the cluster holds {fits} workers, and the batch of "
            f"{batch} images must divide evenly among them, two or more for each"
        )
    return settings.final_workers


def check_storage(experiment: Experiment) -> None:
    """Writes and reads a small object from every node of the cluster.

    Raises:
        StorageError: a node cannot write there, or what it writes is not what the others see.
    """

    @ray.remote(num_cpus=0)
    def leave_mark(mark: str) -> None:
        experiment.write(mark, mark.encode())

    for node in ray.nodes():
        if not node["Alive"]:
            continue
        mark = f".probe-{node['NodeID'][:8]}"
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            ray.get(leave_mark.options(scheduling_strategy=there).remote(mark))
        except ray.exceptions.RayTaskError as error:
            raise StorageError(f"node {node['NodeManagerAddress']}: {error.cause}") from error
        if experiment.read(mark) != mark.encode():
            raise StorageError(
                f"{experiment.uri}: what node {node['NodeManagerAddress']} writes there is not seen here; with "
                "several nodes --storage must be a shared file system or an object store (s3://, gs://)"
            )
        experiment.delete(mark)
