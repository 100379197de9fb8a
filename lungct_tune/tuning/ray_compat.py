"""All private names of Ray and Optuna that this project uses, in one place.

One exception: `SlotTrainer` overrides private methods of Ray's trainer, which a test looks for.

Because of them pyproject.toml pins the minor versions of both. For a new version, tests/tuning/test_ray_compat.py says
which of the names have moved. They are imported only when they are needed: worker processes import this module and must
not import Optuna.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

HEAD_NODE = "node:__internal_head__"
"""A resource that only the head has."""


class Private(StrEnum):
    """Private names of Ray and Optuna, "module:attribute"."""

    LATEST_CLUSTER = "ray._private.services:find_bootstrap_address"
    """The address of the cluster that was started last here, which `ray.init` joins; None if there is none."""

    LOCAL_RESOURCES = "ray._private.resource_and_label_spec:ResourceAndLabelSpec"
    """The resources that `ray.init` gives to a cluster that it starts on this machine."""

    DATA_PARALLEL_TRAINER = "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer"
    """The base class of TorchTrainer. Its module does not import torch."""

    TORCH_BACKEND = "ray.train.torch.config:_TorchBackend"
    """Sets up torch.distributed in Ray Train's workers; subclassed to set the network interface of every worker."""

    DATASETS_CALLBACK = "ray.train.v2._internal.callbacks:DatasetsCallback"
    """Starts an actor that distributes Ray datasets. It would cost a process and 0.2 GB on the head for each group of
    workers, and this project uses no Ray datasets."""

    CLEANER_CALLBACK = "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback"
    """Starts a detached actor that removes the placement group of a dead controller. The search does this itself."""

    TRAIN_CONTROLLER = "ray.train.v2._internal.execution.controller.controller:TrainController"
    """Runs a group of workers. Ray Train starts it in an actor of its own."""

    HEALTH_CHECK_FAILED = "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError"
    """What Ray Train wraps around an error of a worker's process. An error that the worker raises comes as it is."""

    SCALING_POLICY = "ray.train.v2._internal.execution.scaling_policy:FixedScalingPolicy"
    """Keeps a group of workers at its size."""

    SYNCHRONIZATION_ACTOR = "ray.train.v2._internal.execution.worker_group.worker_group:SynchronizationActor"
    """Brings the workers together in `ray.train.report`, which the workers of a slot do not call."""

    SHUT_DOWN_SYNCHRONIZATION_ACTOR = "ray.train.v2._internal.execution.worker_group.state:_shutdown_sync_actor"
    """Kills that actor."""

    PLACEMENT_GROUP = "ray.train.v2._internal.execution.worker_group.worker_group:placement_group"
    """Reserves the resources of a group of workers. Ray Train gives the placement group no name."""

    DRAINING_NODES = "ray._private.state:state.get_draining_nodes"
    """The nodes that will be lost, and when: notices of spot nodes, and what `ray drain-node` asked for."""

    FREE_RESOURCES = "ray._private.state:available_resources_per_node"
    """The resources of each node that nobody uses, by its id."""

    PROPAGATED_VARIABLES = "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE"
    """Environment variables that Tune sends to its actors. They then appear in Ray's logs and dashboard."""

    UTILIZATION_SCORER = "ray.autoscaler._private.resource_demand_scheduler:_default_utilization_scorer"
    """How version 1 of Ray's autoscaler scores the types of node that it could start."""

    EXPERIMENT_CHECKPOINTS = "ray.tune.execution.experiment_state:_ExperimentCheckpointManager"
    """Writes the state of Tune's experiment, with all trials, every ten seconds and at the end; copies its folder."""

    EXPERIMENT_ANALYSIS = "ray.tune.analysis.experiment_analysis:ExperimentAnalysis"
    """What Tune returns at its end. It reads the results of all trials from files."""

    TUNE_CONTROLLER = "ray.tune.execution.tune_controller:TuneController"
    """Runs trials in actors."""

    OPTUNA_TRIAL = "optuna.trial:Trial"
    """Optuna's handle on a trial. In the public interface only `ask` makes one, and only for new trials."""

    def load(self) -> Any:
        """Imports it.

        Raises:
            ImportError, AttributeError: this version of Ray or Optuna does not have it.
        """
        module, _, attributes = self.partition(":")
        return attrgetter(attributes)(import_module(module))


def reopen_trial(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """Optuna's handle on a trial that an earlier process left running."""
    made: Trial = Private.OPTUNA_TRIAL.load()(study, trial._trial_id)
    return made


def report_value(trial: Trial, epoch: int, value: float) -> None:
    """Sets a trial's intermediate value. `report` alone does not replace one that is there already."""
    trial._cached_frozen_trial.intermediate_values.pop(epoch, None)
    trial.report(value, epoch)


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage of a study."""
    return study._storage


def suggest_value(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """Draws a trial's value of a parameter. The public `suggest_…` methods take no distribution objects."""
    return trial._suggest(name, distribution)


def keep_credentials_from_actors() -> None:
    """Stops Tune from sending AWS credentials to its actors, and so into Ray's logs and dashboard.

    The actors do not need them: nodes have credentials of their own.
    """
    variables: set[str] = Private.PROPAGATED_VARIABLES.load()
    variables.difference_update({name for name in variables if name.startswith("AWS_")})


@contextmanager
def without_files_of_tune() -> Iterator[None]:
    """Keeps Tune from writing results and the state of its experiment, which nothing reads.

    Only the first state is written, because Tune looks for the file at its end.
    """
    checkpoints, analysis = Private.EXPERIMENT_CHECKPOINTS.load(), Private.EXPERIMENT_ANALYSIS.load()
    sync, fetch = checkpoints.sync_up_experiment_state, analysis._fetch_trial_dataframes

    def sync_first(self: Any, save_fn: Callable[[], None], force: bool = False, wait: bool = False) -> None:
        if self._last_sync_time is None:
            sync(self, save_fn, wait=True)

    variable = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
    of_user = os.environ.get(variable)
    os.environ[variable] = "1"
    checkpoints.sync_up_experiment_state, analysis._fetch_trial_dataframes = sync_first, lambda self: {}
    try:
        yield
    finally:
        checkpoints.sync_up_experiment_state, analysis._fetch_trial_dataframes = sync, fetch
        del os.environ[variable]
        if of_user is not None:
            os.environ[variable] = of_user


@contextmanager
def without_ending_actors_that_start() -> Iterator[None]:
    """Keeps Tune from ending an actor that is still starting.

    When a trial ends, Tune gives its actor to any trial that waits, also to one whose own actor is starting. That one
    is ended then, and for the next trial another one is started. So with many slots and short trials, Tune would start
    processes again and again. Here the idle actor is for the next trial, as long as there is one.
    """
    controller = Private.TUNE_CONTROLLER.load()
    reuse = controller._maybe_reuse_cached_actor

    def reuse_unless_starting(self: Any, trial: Any) -> bool:
        has_own = trial in self._trial_to_actor and trial not in self._resetting_trials
        if has_own and not (self._search_alg.is_finished() and self._pending_trials <= self._trial_to_actor.keys()):
            return False
        return bool(reuse(self, trial))

    controller._maybe_reuse_cached_actor = reuse_unless_starting
    try:
        yield
    finally:
        controller._maybe_reuse_cached_actor = reuse


@contextmanager
def without_counting_a_dead_actor_twice() -> Iterator[None]:
    """Keeps a trial whose actor dies before Tune has reset it for the trial.

    Tune hears of it twice: that the actor has ended, after which the trial waits for another one, and that the reset
    has failed. To Tune, the second is the end of a trial that waits, whatever `max_failures` is.
    """
    controller = Private.TUNE_CONTROLLER.load()
    process = controller._process_trial_failure

    def process_once(self: Any, trial: Any, exception: Exception) -> None:
        self._resetting_trials.discard(trial)
        if trial.status != trial.PENDING or trial in self._trial_to_actor:
            process(self, trial, exception)

    controller._process_trial_failure = process_once
    try:
        yield
    finally:
        controller._process_trial_failure = process


class PlacementGroups:
    """Makes the placement groups of one Train controller, until it is closed.

    A controller whose placement group was removed makes another one. It would do so also while its process is being
    killed, and nobody would remove that one: Ray removes those of a job at the job's end, and not later ones.

    Args:
        name: of all of them, so that another process can remove those of a dead one.
    """

    def __init__(self, name: str) -> None:
        self._name, self._is_closed, self._lock = name, False, threading.Lock()

    def make(self, *args: Any, **options: Any) -> Any:
        """Reserves room for workers.

        Raises:
            RuntimeError: it is closed.
        """
        from ray.util import placement_group

        with self._lock:  # so that after `close` none is being made
            if self._is_closed:
                raise RuntimeError(f"{self._name} has been released")
            return placement_group(*args, **options | {"name": self._name})

    def close(self) -> None:
        """From now on no placement group is made. Ray knows all that were made before."""
        with self._lock:
            self._is_closed = True


_groups_of_controller: ContextVar[PlacementGroups] = ContextVar("_groups_of_controller")
"""Of the controller that runs in this thread."""


def prepare_controller(groups: PlacementGroups) -> None:
    """Changes how the Train controller that is to run in this thread starts groups of workers.

    It starts no `SYNCHRONIZATION_ACTOR`, and it makes its placement groups with `groups`.
    """
    _groups_of_controller.set(groups)
    for private_name, replacement in (
        (Private.SYNCHRONIZATION_ACTOR, _NoActor()),
        (Private.SHUT_DOWN_SYNCHRONIZATION_ACTOR, lambda actor: None),
        (Private.PLACEMENT_GROUP, lambda *args, **options: _groups_of_controller.get().make(*args, **options)),
    ):
        module, _, attribute = private_name.partition(":")
        setattr(import_module(module), attribute, replacement)


class _NoActor:
    """Is made and passed on like an actor class, but starts nothing."""

    def options(self, **options: Any) -> _NoActor:
        return self

    def remote(self, **arguments: Any) -> _NoActor:
        return self


def worker_errors(error: Exception) -> list[Exception]:
    """What has ended the workers of a Train run; nothing if the run has failed by itself.

    Args:
        error: of the run.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    of_process = Private.HEALTH_CHECK_FAILED.load()
    return [each.health_check_failure if isinstance(each, of_process) else each for each in failures.values()]


def has_local_cluster() -> bool:
    """Whether a Ray cluster was started on this machine that `ray.init` would join."""
    return Private.LATEST_CLUSTER.load()(None) is not None


def local_resources() -> dict[str, float]:
    """The resources that a cluster has which `ray.init` starts on this machine."""
    found = Private.LOCAL_RESOURCES.load()().resolve(is_head=True, node_ip_address="127.0.0.1")
    return dict(found.to_resource_dict())


def draining_nodes() -> set[str]:
    """The ids of the nodes of which Ray knows that they will be lost."""
    return set(Private.DRAINING_NODES.load()())


def free_resources() -> dict[str, dict[str, float]]:
    """The resources of each living node that nobody uses, by its id."""
    free: dict[str, dict[str, float]] = Private.FREE_RESOURCES.load()()
    return free


def autoscaling_config(gcs_address: str) -> str | None:
    """The configuration file of a cluster's autoscaler, "" if it has none, None if it does not run on this machine.

    Ray has no function for this, so it is read from the command line of the autoscaler's process.
    """
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" in words and any(word.endswith("monitor.py") for word in words):
            return next((word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")), "")
    return None
