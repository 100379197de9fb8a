"""Starts and ends the server: Ray, Ray Serve, and the two deployments."""

from __future__ import annotations

import hashlib
import io
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from lungct_tune.errors import UserError, number_of
from lungct_tune.evaluation.classifier import BATCH, Classifier
from lungct_tune.serving.model import Model
from lungct_tune.serving.web import APPLICATION, MODEL, Web
from lungct_tune.tuning.allocation import ClusterError
from lungct_tune.tuning.cluster import autoscaler_nodes, joined

WAITING = 100
"""Requests that are worked on at a time, and twice as many that wait. Others are refused with the status 503."""

ENDING_S = 15.0
"""Seconds in which requests that have arrived are answered when the server ends. Kubernetes kills it after 30."""


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and what each of them has."""

    least: int = 1
    most: int | None = None
    """None: as many as the cluster has room for now."""
    gpus: float | None = None
    """Of each; 0 is one CPU. None: one GPU, or on a cluster without GPUs one CPU."""


@contextmanager
def serving(
    classifier: Classifier, host: str, port: int, token: str | None, replicas: Replicas, address: str | None
) -> Iterator[str]:
    """Serves a bundle's model inside the `with` block.

    Args:
        token: is asked for; None: nothing is asked for.
        address: of a Ray cluster; None is the one at hand, or a new one on this machine.

    Yields:
        What the replicas are, as text.

    Raises:
        UserError: the port is taken, Ray Serve runs already, or a replica cannot start.
        ClusterError: the cluster cannot be joined, or has no room.
    """
    _check_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    silence = ExitStack()
    with silence, joined(address, False, "serve"):
        if serve.status().proxies:
            raise UserError(
                "Ray Serve runs already on this cluster; end it (`serve shutdown`), or leave --address out and unset "
                "RAY_ADDRESS to start another cluster"
            )
        gpus, least, most = _scale(replicas, ray.cluster_resources())
        about = {
            "bundle": classifier.config.settings.name,
            "classes": list(classifier.classes),
            "image_size": classifier.image_size,
            "threshold": classifier.threshold,
        }
        model = serve.deployment(
            name=MODEL,
            max_ongoing_requests=2 * BATCH,  # one batch waits while another one is computed
            autoscaling_config=AutoscalingConfig(
                min_replicas=least, max_replicas=most, target_ongoing_requests=BATCH if gpus else 4
            ),
            ray_actor_options={"num_cpus": 0 if gpus else 1, "num_gpus": gpus},
        )(Model).bind(ray.put(classifier), "cuda" if gpus else "cpu")
        web = serve.deployment(
            max_ongoing_requests=WAITING, max_queued_requests=2 * WAITING, ray_actor_options={"num_cpus": 0}
        )(Web).bind(model, about, hashlib.sha256(token.encode()).digest() if token else None)
        try:
            handle = _start(web, host, port)
            each = f"{gpus:g} GPU" if gpus else "1 CPU"
            several = f"{least} to {most} replicas, each"
            try:
                yield f"{several if most > least else number_of(least, 'replica')} with {each}"
            finally:
                # `shutdown` alone would drop the requests that are being answered
                with suppress(TimeoutError, ray.exceptions.RayError):
                    handle.end.remote().result(timeout_s=ENDING_S)
        finally:
            # Ray Serve kills its controller, which still has a task, and Ray would print that
            silence.enter_context(redirect_stdout(io.StringIO()))
            serve.shutdown()


def _start(web: serve.Application, host: str, port: int) -> DeploymentHandle[Any]:
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    try:
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=host, port=port), logging_config=quiet)
        return serve.run(web, name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:
        raise UserError(f"Ray Serve cannot start the model: {error}\n{_why()}") from error


def _why() -> str:
    """The last line of what Ray Serve says of each deployment."""
    deployments = serve.status().applications[APPLICATION].deployments
    return "\n".join(f"{name}: {it.message.strip().rpartition(chr(10))[2]}" for name, it in deployments.items())


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: nothing can listen there ({error.strerror}); choose another --port or --host"
        ) from error


def _scale(replicas: Replicas, resources: Mapping[str, Any]) -> tuple[float, int, int]:
    """GPUs of a replica, and the least and the largest number of replicas."""
    gpus = replicas.gpus if replicas.gpus is not None else float(resources.get("GPU", 0) >= 1)
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
    room = int(resources.get(kind, 0) / each + 1e-9)
    if replicas.least > room and autoscaler_nodes() == []:
        raise ClusterError(
            f"{number_of(replicas.least, 'replica')} with {each:g} {kind} each: too many, since the cluster has "
            f"{resources.get(kind, 0):g} {kind}. Give smaller --replicas or --gpus-per-replica, or another --address"
        )
    return gpus, replicas.least, replicas.most or max(replicas.least, room)
