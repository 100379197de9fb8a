"""The Ray cluster: connecting to it, what it has, and whether what is asked for fits."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.config.settings import Settings
from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning.allocation import (
    ClusterError,
    ResourcePlan,
    RetrainingResources,
    _amounts,
    _count,
    divide,
    divide_for_retraining,
    workers_of,
)
from lungct_tune.tuning.ray_compat import autoscaling_config
from lungct_tune.tuning.workers import PROBE, NodeRefused, check_from_here

WORKER_START_TIMEOUT_S = 7 * 24 * 3600
"""How long a group of workers waits for room. What waits is what the autoscaler sees, and brings nodes for."""

POLL_S = 0.25
"""Seconds between Ray Train's looks at a group of workers. Those of the final retraining wait for one each epoch."""


STORAGE_CHECK_TIMEOUT_S = 120.0
"""How long a node may take to read and write a small file, before the search begins: S3 alone is asked for a minute."""


def connect(address: str | None, verbose: bool, name: str = "") -> str:
    """Joins the cluster at `address`, else the one at hand, else starts one on this machine.

    Args:
        name: what Ray's dashboard calls this job.

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
    # read where groups of workers are started: in the slots, to which Tune sends it on, and here
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKER_START_TIMEOUT_S))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
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
            job_config=ray.job_config.JobConfig(metadata={"job_name": name}),
            ignore_reinit_error=True,
        )
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster {f'at {at}' if at else 'at hand'} asks for a token: {error.message}\n"
            "Run `ray get-auth-token` on its head, and put what it prints into ~/.ray/auth_token here (or into "
            "RAY_AUTH_TOKEN); RAY_AUTH_MODE must be the same here as there."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {at}" if at else "at hand (the last one started here)"
        raise ClusterError(
            f"the Ray cluster {where} cannot be joined: {error}\n"
            "Check that it runs (`ray status`) and that RAY_AUTH_MODE is the same here as there, "
            "or unset RAY_ADDRESS and leave --address out to start one on this machine."
        ) from error
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


@contextmanager
def joined(address: str | None, verbose: bool, name: str) -> Iterator[str]:
    """`connect`; a cluster that was started for it is shut down at the end."""
    started_here = not ray.is_initialized()
    try:
        yield connect(address, verbose, name)
    finally:
        if started_here:
            ray.shutdown()


def plan_resources(settings: Settings) -> ResourcePlan:
    """Slots that the cluster at hand holds or can grow to hold, by the settings where they say.

    Raises:
        ClusterError: not even one slot will ever fit, or fewer than asked.
    """
    return divide(settings, _nodes(), autoscaler_nodes())


def plan_retraining_resources(settings: Settings) -> RetrainingResources:
    """Workers of the final retraining: as many as useful of the nodes that are there, else of those to come.

    Raises:
        ClusterError: there will never be as many as asked.
    """
    return divide_for_retraining(settings, _nodes(), autoscaler_nodes())


def has_shared_file_system(experiment: Experiment) -> bool:
    """Whether every node, those to come too, can open a file where the study lies."""
    return experiment.is_local or (len(ray.nodes()) == 1 and autoscaler_nodes() == [])


def machines() -> str:
    """The nodes that are there, alike ones together: "1 node with 2 CPU, 3 nodes with 16 CPU and 1 GPU (H200)"."""
    alike = Counter(_machine(node) for node in _nodes())
    return ", ".join(f"{_count(n, 'node')} with {machine}" for machine, n in alike.items())


def _machine(node: Mapping[str, float]) -> str:
    amounts = {kind: node[kind] for kind in ("CPU", "GPU") if node.get(kind)}
    accelerators = [kind.partition(":")[2] for kind in node if kind.startswith("accelerator_type:")]
    return _amounts(amounts) + (f" ({', '.join(accelerators)})" if accelerators else "")


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscaler_nodes() -> Sequence[Mapping[str, float]] | None:
    """The resources of every worker node that the cluster's autoscaler would bring if all were needed.

    Empty where there is no autoscaler, or all that it may bring are there; None where that cannot be told from this
    machine (it is not the head, or the head's autoscaler runs elsewhere, as in Kubernetes), or the autoscaler does not
    say what its nodes have.
    """
    file = autoscaling_config(ray.get_runtime_context().gcs_address)
    if file is None:
        return None
    config = yaml.safe_load(Path(file).expanduser().read_text()) if file else {"max_workers": 0}
    all_there = len(_nodes()) > config["max_workers"]  # the head is one more
    return [] if all_there else workers_of(config)


def check_storage(experiment: Experiment) -> None:
    """Reads and writes a small object from every node of the cluster, all of them at once.

    Nodes that come later do so themselves, each time that workers of a slot start on them.

    Raises:
        StorageError: a node cannot, or does not see what this one writes, or says nothing.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(check_from_here)
    experiment.write(PROBE, PROBE.encode())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(experiment)
        for node in nodes
    ]
    try:
        ray.wait(answers, num_returns=len(answers), timeout=STORAGE_CHECK_TIMEOUT_S)
        for node, answer in zip(nodes, answers, strict=True):
            name = f"node {node['NodeManagerAddress']}"
            try:
                ray.get(answer, timeout=0)
            except ray.exceptions.RayTaskError as error:
                refused = isinstance(error.cause, NodeRefused)
                raise error.cause if refused else StorageError(f"{name}: {error.cause}") from error
            except ray.exceptions.GetTimeoutError as error:
                raise StorageError(
                    f"{name}: {experiment.uri}: no answer within {STORAGE_CHECK_TIMEOUT_S:g} s; "
                    "check on that node that it is mounted and responds"
                ) from error
            except ray.exceptions.RayError as error:
                raise StorageError(
                    f"{name} was lost while it looked at {experiment.uri}; `ray status` says what is left: {error}"
                ) from error
    finally:
        with suppress(StorageError):
            experiment.delete(PROBE)
