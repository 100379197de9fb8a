"""One search: Ray Tune over an Optuna study, its trials in slots."""

from __future__ import annotations

import signal
from typing import Any

import optuna
from ray import tune
from rich.console import Console

from lungct_tune.space import SearchSpace
from lungct_tune.tuning.progress import Progress
from lungct_tune.tuning.slots import Slot, SlotPlan
from lungct_tune.tuning.study import StudyPruning, StudySearch, finished_trials

MOST_AT_RANDOM = 10
"""How many trials Optuna draws at random before TPE takes over, at most: a third of a small search."""

MAX_FAILURES = 2
"""How many lost slots a trial may cost before it counts as failed."""


def run_search(
    study: optuna.Study,
    space: SearchSpace,
    plan: SlotPlan,
    *,
    trials: int,
    slots: int,
    seed: int,
    console: Console,
) -> None:
    """Runs trials until the study holds as many finished ones as asked; interrupted ones go on first.

    Raises:
        KeyboardInterrupt: the user stopped the search; the study and the trials' states are as they were.
    """
    search = StudySearch(
        study, space, plan.experiment, seed=seed, startup=max(3, min(MOST_AT_RANDOM, trials // 3)), slots=slots
    )
    remaining = trials - len(finished_trials(study))
    if remaining <= 0:
        return
    with Progress(study, trials, console) as progress:
        tuner = tune.Tuner(
            # Tune refuses a trial without resources; the CPUs and GPUs are its workers' and reserved by them
            tune.with_resources(tune.with_parameters(Slot, plan=plan), {"memory": 1}),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=StudyPruning(search),
                num_samples=remaining,
                max_concurrent_trials=slots,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=plan.experiment.uri,
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                # the workers keep a trial's state themselves, each epoch, straight from where it is
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[progress],
                verbose=0,
            ),
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            tuner.fit()
        finally:
            # Tune's own handler gives way to this one when it has heard a Ctrl-C, and else stays in its place
            stopped = signal.getsignal(signal.SIGINT) is before
            signal.signal(signal.SIGINT, before)
    if stopped or len(finished_trials(study)) < trials:
        raise KeyboardInterrupt


def _trial_name(trial: Any) -> str:
    return f"trial_{trial.config['number']:04d}"
