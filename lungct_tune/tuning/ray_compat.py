"""All that is used here of Ray and Optuna without being part of their public interface, in one place.

Their minor versions are pinned for it in pyproject.toml. tests/tuning/test_ray_compat.py says which of these names
moved when a version does. What is private is imported by name when it is needed:
worker processes import this module, and must not import Optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

TORCH_BACKEND = "ray.train.torch.config:_TorchBackend"
"""Sets up torch.distributed in Ray Train's workers; subclassed so that every worker is told its network interface."""

DATASETS_CALLBACK = "ray.train.v2._internal.callbacks:DatasetsCallback"
"""Starts an actor that deals out Ray datasets: a process and 0.2 GB on the head for each group, and there are none."""

PROPAGATED_VARIABLES = "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE"
"""Environment variables that Tune sends to its actors, and so into Ray's logs and dashboard."""

UTILIZATION_SCORER = "ray.autoscaler._private.resource_demand_scheduler:_default_utilization_scorer"
"""How Ray's first autoscaler scores the types of node that it could start."""

OPTUNA_TRIAL = "optuna.trial:Trial"
"""Optuna's handle on a trial, which only `ask` makes by its public interface, and of new trials only."""

PRIVATE_NAMES = (TORCH_BACKEND, DATASETS_CALLBACK, PROPAGATED_VARIABLES, UTILIZATION_SCORER, OPTUNA_TRIAL)

HEAD_NODE = "node:__internal_head__"
"""A resource that the head alone has."""


def private(name: str) -> Any:
    """What a name of `PRIVATE_NAMES`, "module:attribute", stands for.

    Raises:
        ImportError, AttributeError: this version of Ray or Optuna does not have it.
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def reopen_trial(study: optuna.Study, trial: FrozenTrial) -> Trial:
    """Optuna's handle on a trial that an earlier process left running."""
    made: Trial = private(OPTUNA_TRIAL)(study, trial._trial_id)
    return made


def suggest_value(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """A trial's value of a parameter, drawn from a distribution; the public `suggest_…` take no distributions."""
    return trial._suggest(name, distribution)


def keep_credentials_from_actors() -> None:
    """Tune would send AWS credentials to its actors, and so into Ray's logs and dashboard; nodes have their own."""
    variables: set[str] = private(PROPAGATED_VARIABLES)
    variables.difference_update({name for name in variables if name.startswith("AWS_")})


def autoscaling_config(gcs_address: str) -> str | None:
    """The configuration file of the autoscaler that runs on this machine for a cluster, "" if it has none.

    None where no autoscaler of that cluster runs here. Ray has no way to ask; its process has both in its command line.
    """
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" in words and any(word.endswith("monitor.py") for word in words):
            return next((word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")), "")
    return None
