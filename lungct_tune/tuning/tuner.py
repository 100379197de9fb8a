"""Runs a search: Ray Tune with an Optuna study, and trials in slots."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

import optuna
import ray
from ray import tune

from lungct_tune.config.search_space import SearchSpace
from lungct_tune.data.split import DataSplit
from lungct_tune.display import Display
from lungct_tune.errors import SearchStopped, UserError
from lungct_tune.experiment.bundle import versions
from lungct_tune.experiment.forecast import Workload
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import read_trials, rungs, study_errors
from lungct_tune.experiment.trial import TrialRecord
from lungct_tune.stopping import at_stop
from lungct_tune.tuning.allocation import ResourcePlan
from lungct_tune.tuning.background import BackgroundThreads
from lungct_tune.tuning.callbacks.best_so_far import BestSoFarCallback
from lungct_tune.tuning.callbacks.clock import SlotTimeCallback
from lungct_tune.tuning.callbacks.progress import ProgressCallback
from lungct_tune.tuning.callbacks.prometheus import PrometheusCallback
from lungct_tune.tuning.callbacks.scoreboard import ScoreboardCallback
from lungct_tune.tuning.callbacks.tensorboard import TensorBoardCallback
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.groups import remove_placement_groups
from lungct_tune.tuning.ray_compat import (
    keep_credentials_from_actors,
    without_counting_a_dead_actor_twice,
    without_ending_actors_that_start,
    without_files_of_tune,
)
from lungct_tune.tuning.sampler import startup_trials
from lungct_tune.tuning.searcher import OptunaScheduler, OptunaSearcher
from lungct_tune.tuning.shared_data import share_dataset
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.slots import ON_HEAD, ORDER, TuneSlot
from lungct_tune.tuning.time_left import TimeLeft

if TYPE_CHECKING:
    import torch

MAX_FAILURES = 10
"""How often a slot's actor, which is on the head, may die during a trial before the trial counts as failed."""

STORAGE_THREADS = 4
"""Threads that delete and upload files, so that a storage with a latency of 100 ms keeps up with 20 trials a second."""

keep_credentials_from_actors()


def make_slot_plan(
    plan: Plan,
    split: DataSplit,
    weights: dict[str, torch.Tensor] | None,
    resources: ResourcePlan,
    mailbox: Any,
    file: Path | None,
) -> SlotPlan:
    """The configuration of a search's slots, with the images of train and validation, and no test image.

    Args:
        weights: pretrained ones; None starts from random ones. All workers share them.
        mailbox: of `opened_mailbox`.
        file: the file for images that are too large for the object store, see `share_images`.
    """
    assert plan.settings.epochs is not None  # decided by the plan
    backbone = None if weights is None else ray.put(weights)
    return SlotPlan(
        experiment=plan.experiment,
        dataset=share_dataset(plan.settings, split.images, split.searched_rows, backbone, path=file),
        folds=tuple(Fold(*rows) for rows in split.folds),
        workers=resources.workers,
        resources_per_worker=resources.resources_per_worker,
        mailbox=mailbox,
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
    display: Display,
    left: TimeLeft | None = None,
    so_far: Callable[[TrialRecord, bytes], Mapping[str, bytes]] | None = None,
) -> None:
    """Runs trials until the study has `trials` finished ones. Interrupted trials continue first.

    Args:
        left: estimates the time left, of the whole job; by default of these trials alone.
        so_far: makes the files of a bundle from the best trial so far and its weights.

    Raises:
        KeyboardInterrupt: the user stopped the search; the study and the trials' states are kept.
        SearchStopped: too many trials failed one after the other, or Ray Tune has ended early.
        NodeRefused: a node that joined later cannot use the storage; the study and the states are kept.
        JournalError, StudyError: the study cannot be written; what was written before is kept.
    """
    earlier = read_trials(study)
    with BackgroundThreads(STORAGE_THREADS) as storage_threads, TemporaryDirectory() as scratch:
        searcher = OptunaSearcher(
            study,
            space,
            plan.experiment,
            epochs=plan.dataset.epochs,
            seed=seed,
            startup=startup_trials(trials),
            storage_threads=storage_threads,
            provenance=provenance(plan),
        )
        tally = searcher.tally
        remaining = trials - tally.finished
        if remaining <= 0:
            return
        trained_s = sum(trial.seconds for trial in earlier)
        epochs = plan.dataset.epochs
        alone = Workload(trials, epochs, plan.rungs, slots, 4, 1, 5, 0, batch_size=1, retrains=False)
        left = left or TimeLeft(alone, earlier)
        clock = SlotTimeCallback(study, plan, slots)
        board = TensorBoardCallback(plan.experiment, storage_threads)
        callbacks = [
            clock,
            board,
            ScoreboardCallback(plan.mailbox, tally, trials),
            PrometheusCallback(tally, plan.experiment.name, trials, clock, trained_s),
        ]
        if so_far:
            callbacks.append(BestSoFarCallback(tally, plan.experiment, storage_threads, so_far))
        with ExitStack() as held:
            progress = ProgressCallback(tally, earlier, trials, epochs, clock, left, display)
            held.enter_context(progress)
            held.enter_context(clock)
            held.enter_context(board)
            held.enter_context(without_files_of_tune())
            held.enter_context(without_ending_actors_that_start())
            held.enter_context(without_counting_a_dead_actor_twice())
            held.callback(remove_placement_groups, plan.slots)
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
                    storage_path=scratch,  # the study has all that is needed to continue, and not Tune
                    failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                    # the workers themselves write a trial's state to the storage
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[*callbacks, progress],
                    verbose=0,
                ),
            )
            stopped = _fit(tuner, progress.say_stopping)
            if not stopped:
                searcher.tell_failed()
    if stopped:
        raise KeyboardInterrupt
    if tally.finished < trials:
        raise SearchStopped(
            f"Ray Tune has ended after {tally.finished} of {trials} trials; --verbose prints what it says about it"
        )


def _fit(tuner: tune.Tuner, say_stopping: Callable[[], None]) -> bool:
    """Runs the trials; returns whether the user stopped them. A second Ctrl-C does not wait for their states.

    Raises:
        NodeRefused, JournalError, StudyError: see `run_search`.
        KeyboardInterrupt: Ctrl-C before the trials have started, or a second one.
    """
    before, stopped = signal.getsignal(signal.SIGUSR1), Event()

    def stop() -> None:
        if stopped.is_set() or signal.getsignal(signal.SIGUSR1) == before:
            raise KeyboardInterrupt
        stopped.set()
        say_stopping()
        signal.raise_signal(signal.SIGUSR1)  # Tune's own signal: it ends the trials, whose workers save their states

    try:
        with at_stop(stop):
            tuner.fit()
    except tune.TuneError as error:  # Tune wraps the exceptions of scheduler and searcher in it
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (UserError, *study_errors())):
            cause = cause.__context__
        raise cause or error from None
    finally:
        signal.signal(signal.SIGUSR1, before)
    return stopped.is_set()


def provenance(plan: SlotPlan) -> dict[str, Any]:
    """The versions and resources on which a trial's figures depend, in addition to configuration, seed and data.

    On CPUs the precision of training too. It is that of this machine, which is taken for all nodes.
    """
    import torch

    from lungct_tune.models.preprocessing import training_precision_for

    resources: dict[str, Any] = {f"{kind} a worker": amount for kind, amount in plan.resources_per_worker.items()}
    if not plan.resources_per_worker.get("GPU"):
        resources["precision"] = str(training_precision_for(torch.device("cpu"))).removeprefix("torch.")
    return versions() | {"workers": plan.workers} | resources


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config[ORDER].number:04d}"
