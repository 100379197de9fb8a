"""The process group of a group of workers, over the network that Ray itself uses.

Gloo, left alone, listens at the address that a host gives to its own name. On Debian and Ubuntu that is 127.0.1.1,
and workers on other hosts look for it in vain until a time-out of half an hour. NCCL finds its interfaces itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class ProcessGroup(TorchConfig):
    """Ray Train's set-up of torch.distributed, after every worker was told its interface."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """Tells Gloo the interface that has the node's address, unless the user did."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
