"""The Ray cluster: connects to it, finds out its resources, checks its storage."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.config.settings import Settings
from lungct_tune.display import Display
from lungct_tune.errors import first_line, number_of
from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.stopping import own_signals, stop_delayed
from lungct_tune.tuning.allocation import ClusterError, describe_resources, divide, workers_of
from lungct_tune.tuning.ray_compat import autoscaling_config, has_local_cluster, local_resources
from lungct_tune.tuning.storage_check import PROBE, check_from_here

STORAGE_CHECK_TIMEOUT_S = 120.0
"""How long a node may take to read and write a small file before the search starts. S3's retries alone may take a
minute."""


def connect(address: str | None, verbose: bool, name: str = "") -> str:
    """Joins the cluster at `address`, or without one a running cluster, or else starts one on this machine.

    Args:
        name: the name of this job in Ray's dashboard.

    Returns:
        The address of Ray's dashboard, or an empty string if there is none.

    Raises:
        ClusterError: there is no cluster at `address`, or Tune cannot use it from here.
    """
    at = address or os.environ.get("RAY_ADDRESS", "")
    if at.startswith(("ray://", "http://", "https://")):
        what = "Ray's client" if at.startswith("ray://") else "the server of `ray job`"
        raise ClusterError(
            f"{'--address' if address else 'RAY_ADDRESS'} {at}: Ray Tune does not run through {what}; give the head's "
            "HOST:PORT (6379) on a node of the cluster, or send the command there with `ray job submit`"
        )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # run_search has its own, for all signals
    # Trials use absolute paths; a change of the working folder would break the user's relative ones
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # the processes of slots wait most of the time. More of them start at once than there are CPUs, so Ray would warn
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(4 * (os.cpu_count() or 1)))
    if not verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new reporter prints even at verbose=0
        # the search itself reports a trial's failure, in one line; Ray's log files have the traces
        logging.getLogger("ray").setLevel(logging.CRITICAL)
    host, _, port = at.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes before it reports an error
            socket.create_connection((host, int(port)), timeout=10).close()
        with own_signals():
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
    except Exception as error:  # Ray raises any kind
        token = Path("~/.ray/auth_token").expanduser()
        if isinstance(error, OSError) and Path(str(error.filename)) in (token, *token.parents):
            raise ClusterError(
                f"Ray cannot write its token to {token}: {error.strerror}. Set HOME to a folder that you can "
                "write to, or RAY_AUTH_TOKEN to a long secret of your own"
            ) from error
        if starts_here(address):
            raise ClusterError(
                f"Ray cannot start on this machine: {first_line(error)}\nIf other programs keep the machine busy, run "
                f"the command again later. Ray's files are in {os.environ.get('RAY_TMPDIR', '/tmp')}/ray: set "
                "RAY_TMPDIR to a folder with a short path, below 50 characters, that you can write to and that has "
                "space; or give the --address of a cluster"
            ) from error
        where = f"at {at}" if at else "at hand (the last one started here)"
        raise ClusterError(
            f"the Ray cluster {where} cannot be joined: {error}\n"
            "Check that it runs (`ray status`) and that RAY_AUTH_MODE is the same here as there, "
            "or unset RAY_ADDRESS and leave --address out to start one on this machine."
        ) from error
    return f"http://{context.dashboard_url}" if context.dashboard_url else ""


@contextmanager
def joined(address: str | None, verbose: bool, name: str) -> Iterator[str]:
    """Does `connect`. At the end it shuts down a cluster that this process started."""
    started_here = not ray.is_initialized()
    try:
        yield connect(address, verbose, name)
    finally:
        if started_here:
            with stop_delayed():  # half of it would leave a process that waits for a minute and dies with status 1
                ray.shutdown()


def starts_here(address: str | None) -> bool:
    """Whether `connect` would start a cluster on this machine, and join none."""
    at = address or os.environ.get("RAY_ADDRESS", "")
    return not ray.is_initialized() and (at == "local" or not (at or has_local_cluster()))


@contextmanager
def joined_meanwhile(address: str | None, verbose: bool, name: str, display: Display) -> Iterator[Future[str]]:
    """Does `joined` in a thread, while the images are read; yields the future address of the cluster's dashboard.

    Images that are refused in the first half second start no cluster.

    Raises:
        ClusterError: from the future: the cluster cannot be joined.
    """
    refused = Event()

    def join() -> str:
        if refused.wait(timeout=0.5):
            return ""
        with display.step("starting Ray" if starts_here(address) else "joining the Ray cluster"):
            return cluster.enter_context(joined(address, verbose, name))

    # Linux ends the processes of a cluster together with the thread that started them, so the thread stays until then
    with ThreadPoolExecutor(1) as thread, ExitStack() as cluster:
        joining = thread.submit(join)
        try:
            yield joining
        finally:
            refused.set()
            with display.step("ending Ray"):
                wait([joining])
                cluster.close()


def workers_have_gpus(settings: Settings, joining: Future[str] | None) -> bool:
    """Whether the workers of a search get GPUs.

    Args:
        joining: of `joined_meanwhile`: waits for the cluster; None if none is joined.

    Raises:
        ClusterError: the cluster cannot be joined, or is too small.
    """
    if joining is not None:
        joining.result()
    return "GPU" in divide(settings, *cluster_nodes()).resources_per_worker


def cluster_nodes() -> tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]] | None]:
    """The resources of the present nodes, and of those that the autoscaler may start (see `autoscaler_nodes`).

    Before a cluster is joined they are those of the one that would be started on this machine.
    """
    return (_nodes(), autoscaler_nodes()) if ray.is_initialized() else ([local_resources()], [])


def has_shared_file_system(experiment: Experiment) -> bool:
    """Whether every present and future node can open a file in the study's folder."""
    return experiment.is_local or (len(ray.nodes()) == 1 and autoscaler_nodes() == [])


def machines() -> str:
    """The present nodes by kind, as text: "1 node with 2 CPU, 3 nodes with 16 CPU and 1 GPU (H200)"."""
    alike = Counter(_machine(node) for node in _nodes())
    return ", ".join(f"{number_of(n, 'node')} with {machine}" for machine, n in alike.items())


def _machine(node: Mapping[str, float]) -> str:
    amounts = {kind: node[kind] for kind in ("CPU", "GPU") if node.get(kind)}
    accelerators = [kind.partition(":")[2] for kind in node if kind.startswith("accelerator_type:")]
    return describe_resources(amounts) + (f" ({', '.join(accelerators)})" if accelerators else "")


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscaler_nodes() -> Sequence[Mapping[str, float]] | None:
    """The resources of every worker node that the cluster's autoscaler may start.

    Empty if there is no autoscaler, or it has already started all of them. None if that is unknown: this machine is not
    the head, the autoscaler does not run on the head (as in Kubernetes), or its configuration does not give the
    resources of its nodes.
    """
    file = autoscaling_config(ray.get_runtime_context().gcs_address)
    if file is None:
        return None
    config = yaml.safe_load(Path(file).expanduser().read_text()) if file else {"max_workers": 0}
    all_there = len(_nodes()) > config["max_workers"]  # the head is one more
    return [] if all_there else workers_of(config)


def check_storage(experiment: Experiment) -> None:
    """Reads and writes a small file from every node of the cluster, all nodes at once.

    Workers of a slot repeat the check when they start, so that later nodes are checked too.

    Raises:
        StorageError: a node cannot read or write, does not see this node's file, or does not answer.
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
                    f"{name} was lost while it checked {experiment.uri}; `ray status` lists the other nodes: {error}"
                ) from error
    finally:
        with suppress(StorageError):
            experiment.delete(PROBE)
