"""Ray Train's trainer for groups of workers, with the changes that this project needs.

It is the base class of Ray's TorchTrainer, whose module imports torch. A slot's actor does without: that saves 1.6 s of
CPU and 250 MB of the head's memory for each slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.backend import BackendConfig

from lungct_tune.tuning.ray_compat import PlacementGroups, Private, prepare_controller


class SlotTrainer(Private.DATA_PARALLEL_TRAINER.load()):  # type: ignore[misc]
    """A trainer whose controller runs in the actor that calls `fit`, instead of an actor of its own.

    This saves three processes for each slot: the controller, the actor that would remove the placement group if the
    controller died, and the actor for `ray.train.report`, which a slot's workers do not call. There is no actor that
    distributes Ray datasets either, because this project uses none. Several workers are in a process group of
    torch.distributed.

    Args:
        run_worker: the function that every worker runs with `config`.
        groups: makes its placement groups.
        avoid: ids of nodes on which no worker may start.
    """

    def __init__(
        self,
        run_worker: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        workers: int,
        resources_per_worker: dict[str, float],
        run_config: RunConfig,
        groups: PlacementGroups,
        avoid: Iterable[str] = (),
    ) -> None:
        backend = BackendConfig()
        if workers > 1:
            from lungct_tune.tuning.process_group import ProcessGroup  # imports torch

            backend = ProcessGroup()
        super().__init__(
            run_worker,
            train_loop_config=config,
            backend_config=backend,
            scaling_config=scaling(workers, resources_per_worker, avoid),
            run_config=run_config,
        )
        self._groups = groups

    def _create_default_callbacks(self) -> list[Any]:
        without = Private.DATASETS_CALLBACK.load(), Private.CLEANER_CALLBACK.load()
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        prepare_controller(self._groups)
        # otherwise it starts an actor that asks the autoscaler for what the placement group asks for too
        arguments["scaling_policy"] = _FixedSize(arguments["scaling_policy"].scaling_config)
        controller = Private.TRAIN_CONTROLLER.load()(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


def scaling(workers: int, resources_per_worker: dict[str, float], avoid: Iterable[str] = ()) -> ScalingConfig:
    """Ray Train's description of a group of workers.

    Args:
        avoid: ids of nodes on which no worker may start.
    """
    gpu = resources_per_worker.get("GPU", 0) > 0
    elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else None
    return ScalingConfig(
        num_workers=workers,
        use_gpu=gpu,
        resources_per_worker=resources_per_worker,
        label_selector=elsewhere,  # type: ignore[call-arg]  # exists in Train V2, but mypy sees V1
    )


class _FixedSize(Private.SCALING_POLICY.load()):  # type: ignore[misc]
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
