"""Ray Train's TorchTrainer for groups of workers, with the changes that this project needs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train import RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lungct_tune.tuning.ray_compat import (
    CLEANER_CALLBACK,
    DATASETS_CALLBACK,
    SCALING_POLICY,
    TORCH_BACKEND,
    TRAIN_CONTROLLER,
    PlacementGroups,
    prepare_controller,
    private,
)
from lungct_tune.tuning.workers import scaling


class GroupTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose process group uses the network that Ray itself uses.

    It does not start the actor that distributes Ray datasets, because this project uses none.

    Args:
        run_worker: the function that every worker runs with `config`.
        avoid: ids of nodes on which no worker may start.
    """

    def __init__(
        self,
        run_worker: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        workers: int,
        resources_per_worker: dict[str, float],
        run_config: RunConfig,
        avoid: Iterable[str] = (),
    ) -> None:
        super().__init__(
            run_worker,
            train_loop_config=config,
            torch_config=ProcessGroup(),
            scaling_config=scaling(workers, resources_per_worker, avoid),
            run_config=run_config,
        )

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # exists in Train V2, but mypy sees V1
        return [callback for callback in made if not isinstance(callback, private(DATASETS_CALLBACK))]


class SlotTrainer(GroupTrainer):
    """A GroupTrainer whose controller runs in the actor that calls `fit`, instead of an actor of its own.

    This saves three processes for each slot: the controller, the actor that would remove the placement group if the
    controller died, and the actor for `ray.train.report`, which a slot's workers do not call.

    Args:
        groups: makes its placement groups.
        arguments: see `GroupTrainer`.
    """

    def __init__(self, groups: PlacementGroups, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._groups = groups

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, private(CLEANER_CALLBACK))]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        prepare_controller(self._groups)
        # otherwise it starts an actor that asks the autoscaler for what the placement group asks for too
        arguments["scaling_policy"] = _FixedSize(arguments["scaling_policy"].scaling_config)
        controller = private(TRAIN_CONTROLLER)(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


class _FixedSize(private(SCALING_POLICY)):  # type: ignore[misc]
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


@dataclass
class ProcessGroup(TorchConfig):
    """Ray Train's set-up of torch.distributed, with Gloo's network interface set on every worker.

    By default Gloo listens at the address of the host's own name. On Debian and Ubuntu that is 127.0.1.1, which
    workers on other hosts cannot reach: they fail after a time-out of half an hour. NCCL finds its interfaces itself.
    """

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(private(TORCH_BACKEND)):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """Sets Gloo's interface to the one with the node's address, unless the user has set it."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
