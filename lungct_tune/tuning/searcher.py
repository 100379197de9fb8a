"""The Optuna study as the one memory of a search: what Ray Tune asks, reports and stops goes through it.

Ray ships `OptunaSearch`, but it tells trials that a scheduler stopped as complete (with the value of a
shorter budget) and keeps its state in a pickle that lags behind. Here every epoch is an intermediate value
in the study's storage the moment it is known, a trial stopped early is PRUNED, and what the storage holds is
enough to go on with the search after any crash.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import Trial, TrialState
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lungct_tune.config.search_space import SearchSpace
from lungct_tune.experiment.folder import Experiment, state_file
from lungct_tune.experiment.study import (
    BAD_SCORE,
    BASELINE,
    COMPLETED,
    DIVERGED,
    EPOCH_FIGURES,
    FAILED,
    FINISHED,
    STOPPED,
    WHEN_AND_WHERE,
)
from lungct_tune.filesystem import StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.workers import NodeRefused

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class _Live:
    """A trial that runs: Optuna's handle on it and what the study has been told."""

    trial: Trial
    history: list[dict[str, float]] = field(default_factory=list)
    failure: str = "unknown"
    """The last thing that went wrong; a trial may have recovered from it."""


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher over an Optuna study.

    A suggestion depends on the seed, the trial's number and what the study's trials have shown, not on how
    often the search was interrupted on the way there.

    Args:
        startup: how many trials Optuna draws at random before TPE has enough to learn from.
        folds: how many models a trial trains, each of which keeps a state.
        provenance: noted of every trial that begins or goes on.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        experiment: Experiment,
        *,
        seed: int,
        startup: int,
        folds: int = 1,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._study, self._space, self._experiment, self._seed = study, space, experiment, seed
        self._startup, self._folds, self._made_with = startup, folds, dict(provenance or {})
        self._live: dict[str, _Live] = {}
        self._interrupted: deque[Trial] = deque()
        study.sampler = self._sampler()
        for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = Trial(study, running._trial_id)
            if (ended := trial.user_attrs.get("ended")) is None:
                self._interrupted.append(trial)
            else:  # it had ended, and the driver died before it told the study
                self._tell(trial, ended)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The configuration for Ray's next trial: first those that an interruption left running."""
        with warnings.catch_warnings():
            # experimental arguments, and fixed trials that lie outside the ranges, are meant
            warnings.simplefilter("ignore")
            self._study.sampler = self._sampler()
            trial = self._interrupted.popleft() if self._interrupted else self._study.ask()
            for name, distribution in self._space.distributions.items():
                trial._suggest(name, distribution)  # also those that a crash in the middle of this left open
        configuration = trial.user_attrs.get("configuration")
        if configuration is None:
            configuration = self._space.configuration(trial.params).as_dict()
            trial.set_user_attr("configuration", configuration)
        trial.set_user_attr("made_with", self._made_with)
        self._live[trial_id] = _Live(trial, list(trial.user_attrs.get("history", [])))
        return {"number": trial.number, "seed": self._seed, "configuration": configuration}

    def _sampler(self) -> optuna.samplers.BaseSampler:
        started = len(self._study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))
        seed = int(np.random.SeedSequence([self._seed, started]).generate_state(1)[0])
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=self._startup, multivariate=True, constant_liar=True
        )

    def record(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tells the study of an epoch and of those before that an interruption kept from it."""
        live = self._live[trial_id]
        if "diverged" not in result:
            last = {key: result[key] for key in (*EPOCH_FIGURES, *WHEN_AND_WHERE) if key in result}
            for figures in [*result.get("earlier", []), last]:
                if figures["epoch"] > len(live.history):
                    live.trial.report(figures[OBJECTIVE], int(figures["epoch"]))
                    live.history.append(figures)
            live.trial.set_user_attr("history", live.history)

    def should_stop(self, trial_id: str) -> bool:
        """Whether the trial should stop after the epoch that was recorded last.

        The published configuration never should: the search is measured against what it reaches with all its
        epochs. The pruner is asked of it all the same, since its rungs are what the others are measured against.
        """
        live = self._live[trial_id]
        stop = live.trial.should_prune()
        if stop and live.trial.number != BASELINE:
            live.trial.set_user_attr("ended", f"{STOPPED} after epoch {len(live.history)}")
            return True
        return False

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Keeps why a trial lost its slot, for the case that it cannot go on in another."""
        self._live[trial_id].failure = reason

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended, then drops what only a running trial needs."""
        live = self._live[trial_id]
        if error or result is None:
            ended = f"{FAILED}: {live.failure}"
        elif "failed" in result:
            ended = f"{FAILED}: {result['failed']}"
        elif "diverged" in result:
            ended = f"{DIVERGED}: {result['diverged']}"
        elif (stopped := live.trial.user_attrs.get("ended")) is not None:
            ended = stopped
        else:
            self.record(trial_id, result)  # a trial's last epoch comes here only
            ended = COMPLETED
        live.trial.set_user_attr("ended", ended)
        self._tell(live.trial, ended)
        del self._live[trial_id]
        with suppress(StorageError):  # what stays there is never read again
            for fold in range(self._folds):
                self._experiment.delete(state_file(live.trial.number, fold))

    def _tell(self, trial: Trial, ended: str) -> None:
        if ended.startswith(FAILED):
            self._study.tell(trial, state=TrialState.FAIL)
        elif ended.startswith(STOPPED):
            self._study.tell(trial, state=TrialState.PRUNED)
        elif ended.startswith(DIVERGED):
            self._study.tell(trial, BAD_SCORE)
        else:
            self._study.tell(trial, max(figures[OBJECTIVE] for figures in trial.user_attrs["history"]))

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save: the study's storage is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration for Tuner.restore, which the study makes needless


class OptunaScheduler(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler that does what the study's pruner says."""

    def __init__(self, search: OptunaSearcher) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Whether the trial goes on.

        Raises:
            NodeRefused: a slot's workers started on a node that cannot use the storage. The study keeps its trials as
                they are.
        """
        if "refused" in result:
            raise NodeRefused(result["refused"])
        self._search.record(trial.trial_id, result)
        stop = self._search.should_stop(trial.trial_id)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        error = trial.get_error()
        self._search.note_failure(trial.trial_id, str(error).strip().splitlines()[-1] if error else "unknown")
