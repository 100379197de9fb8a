"""Ray Train's set-up of torch.distributed for a group of workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from lungct_tune.tuning.ray_compat import Private


@dataclass
class ProcessGroup(TorchConfig):
    """Ray Train's set-up of torch.distributed, with Gloo's network interface set on every worker.

    By default Gloo listens at the address of the host's own name. On Debian and Ubuntu that is 127.0.1.1, which
    workers on other hosts cannot reach: they fail after a time-out of half an hour. NCCL finds its interfaces itself.
    """

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(Private.TORCH_BACKEND.load()):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """Sets Gloo's interface to the one with the node's address, unless the user has set it."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
