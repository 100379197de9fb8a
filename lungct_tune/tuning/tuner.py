"""Runs a search: Ray Tune with an Optuna study, and trials in slots."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from rich.console import Console

from lungct_tune.config.search_space import SearchSpace
from lungct_tune.data.split import DataSplit
from lungct_tune.experiment.bundle import versions
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import finished_trials, rungs
from lungct_tune.filesystem import NodeRefused
from lungct_tune.tuning.allocation import ResourcePlan
from lungct_tune.tuning.callbacks.clock import SlotTimeCallback
from lungct_tune.tuning.callbacks.node_watch import NodeWatchCallback
from lungct_tune.tuning.callbacks.progress import ProgressCallback
from lungct_tune.tuning.callbacks.prometheus import PrometheusCallback
from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.ray_compat import keep_credentials_from_actors
from lungct_tune.tuning.searcher import OptunaScheduler, OptunaSearcher
from lungct_tune.tuning.shared_data import share_dataset
from lungct_tune.tuning.slots import ON_HEAD, TuneSlot, remove_placement_groups
from lungct_tune.tuning.trial_runner import Fold
from lungct_tune.tuning.workers import SlotPlan

MOST_AT_RANDOM = 10
"""The most trials that Optuna draws at random before TPE starts. In a small search it is a third of the trials."""

MAX_FAILURES = 2
"""How often a slot's actor, which is on the head, may die during a trial before the trial counts as failed."""

keep_credentials_from_actors()


def make_slot_plan(
    plan: Plan,
    split: DataSplit,
    backbone: Any,
    resources: ResourcePlan,
    file: Path | None,
) -> SlotPlan:
    """The configuration of a search's slots, with the images of train and validation, and no test image.

    Args:
        backbone: of `share_weights`.
        file: the file for images that are too large for the object store, see `share_images`.
    """
    assert plan.settings.epochs is not None  # decided by the plan
    return SlotPlan(
        experiment=plan.experiment,
        dataset=share_dataset(plan.settings, split.images, split.searched_rows, backbone, path=file),
        folds=tuple(Fold(*rows) for rows in split.folds),
        workers=resources.workers,
        resources_per_worker=resources.resources_per_worker,
        rungs=rungs(plan.settings.epochs),
        checkpoint_interval=plan.settings.checkpoint_interval,
    )


def run_search(
    study: optuna.Study,
    space: SearchSpace,
    plan: SlotPlan,
    *,
    trials: int,
    slots: int,
    seed: int,
    console: Console,
    callbacks: Sequence[tune.Callback],
) -> None:
    """Runs trials until the study has `trials` finished ones. Interrupted trials continue first.

    Raises:
        KeyboardInterrupt: the user stopped the search; the study and the trials' states are kept.
        NodeRefused: a node that joined later cannot use the storage; the study and the states are kept.
    """
    startup = max(3, min(MOST_AT_RANDOM, trials // 3))
    searcher = OptunaSearcher(
        study,
        space,
        plan.experiment,
        seed=seed,
        startup=startup,
        provenance=provenance(plan),
    )
    remaining = trials - len(finished_trials(study))
    if remaining <= 0:
        return
    clock = SlotTimeCallback(study, plan, slots)
    mailbox = opened_mailbox(plan.experiment.name)
    with mailbox as opened, ProgressCallback(study, trials, clock, console) as progress, clock:
        tuner = tune.Tuner(
            # CPUs and GPUs are reserved by the slot's workers, not by its actor
            tune.with_resources(tune.with_parameters(TuneSlot, plan=plan), tune.PlacementGroupFactory([ON_HEAD])),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=OptunaScheduler(searcher),
                num_samples=remaining,
                max_concurrent_trials=slots,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=plan.experiment.root,
                storage_filesystem=plan.experiment.filesystem,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                # the workers themselves write a trial's state to the storage, after each epoch
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[
                    *(clock, progress, PrometheusCallback(study, plan.experiment.name, trials, clock)),
                    *(NodeWatchCallback(opened, console), *callbacks),
                ],
                verbose=0,
            ),
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            tuner.fit()
        except tune.TuneError as error:  # Tune wraps the scheduler's exceptions in it
            if isinstance(error.__context__, NodeRefused):
                raise error.__context__ from None
            raise
        finally:
            # after a Ctrl-C Tune's own handler restores the previous one, otherwise it stays installed
            stopped = signal.getsignal(signal.SIGINT) is before
            signal.signal(signal.SIGINT, before)
            remove_placement_groups(f"{plan.experiment.name} slot")
    if stopped or len(finished_trials(study)) < trials:
        raise KeyboardInterrupt


def provenance(plan: SlotPlan) -> dict[str, Any]:
    """The versions and resources on which a trial's figures depend, in addition to configuration, seed and data."""
    resources = {f"{kind} a worker": amount for kind, amount in plan.resources_per_worker.items()}
    return versions() | {"workers": plan.workers} | resources


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config['number']:04d}"
