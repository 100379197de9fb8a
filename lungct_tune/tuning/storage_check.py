"""Checks that a node can use the storage of an experiment."""

from __future__ import annotations

import time
from contextlib import suppress

import ray

from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import NodeRefused, StorageError

PROBE = ".probe"
"""A file that the head writes to the storage. Every node looks for it and writes a file of its own beside it."""


PROBE_PAUSE_S = 3.0
"""How long a node waits before it tries the storage a second time."""


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
