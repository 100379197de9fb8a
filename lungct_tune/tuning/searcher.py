"""Ray Tune's searcher and scheduler for an Optuna study. The study has the whole state of a search.

Ray's own `OptunaSearch` reports trials that a scheduler stopped as complete (with the value of a shorter
budget), and its state is in a pickle that is not always up to date. Here every epoch is written to the study
at once, as an intermediate value, and a trial that was stopped early is PRUNED. So the search can continue
from the study's storage after any crash.
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

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.experiment.folder import Experiment, delete_states
from lungct_tune.experiment.study import BAD_SCORE, FINISHED
from lungct_tune.experiment.trial import BASELINE, EpochFigures, EpochReport, Outcome, TrialOrder, best_epoch
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.ray_compat import reopen_trial, suggest_value
from lungct_tune.tuning.slots import REPORT


@dataclass
class _Live:
    """A running trial: Optuna's handle on it, and the epochs that the study has."""

    trial: Trial
    history: list[EpochFigures] = field(default_factory=list)
    reported: int = 0
    """How many epochs have intermediate values."""
    stopped: bool = False
    failure: str = "unknown"
    """The last error; the trial may have recovered from it."""

    def record(self, report: EpochReport) -> None:
        """Adds the report's new epochs to the study."""
        for figures in report.epochs:
            self.history[figures.epoch - 1 :] = [figures]  # an epoch that was trained again replaces the earlier one
            if figures.epoch > self.reported:
                self.trial.report(figures.balanced_accuracy, figures.epoch)
                self.reported = figures.epoch
        if report.epochs:
            self.trial.set_user_attr("history", [figures.as_dict() for figures in self.history])

    def end(self, outcome: Outcome, ended: str) -> None:
        """Notes in the study how the trial ended. This comes before `tell`, because a driver may die in between."""
        self.trial.set_user_attr("outcome", outcome.value)
        self.trial.set_user_attr("ended", ended)


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher for an Optuna study.

    A suggestion depends on the seed, the trial's number and the results in the study. It does not depend on
    interruptions of the search.

    Args:
        startup: how many trials Optuna draws at random before TPE starts.
        provenance: noted in the study for every trial that starts or continues.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        experiment: Experiment,
        *,
        seed: int,
        startup: int,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._study, self._space, self._experiment, self._seed = study, space, experiment, seed
        self._startup, self._provenance = startup, dict(provenance or {})
        self._live: dict[str, _Live] = {}
        self._interrupted: deque[Trial] = deque()
        study.sampler = self._sampler()
        for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial = reopen_trial(study, running)
            if (outcome := trial.user_attrs.get("outcome")) is None:
                self._interrupted.append(trial)
            else:  # it had ended, but the driver died before `tell`
                self._tell(trial, Outcome(outcome), _history(trial))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The order for Ray's next trial. Trials that an interruption left running come first."""
        with warnings.catch_warnings():
            # experimental arguments, and fixed trials outside the ranges, are intended
            warnings.simplefilter("ignore")
            self._study.sampler = self._sampler()
            trial = self._interrupted.popleft() if self._interrupted else self._study.ask()
            for name, distribution in self._space.distributions.items():
                suggest_value(trial, name, distribution)  # also those that a crash during an earlier call left out
        if (kept := trial.user_attrs.get("configuration")) is not None:
            hyperparameters = Hyperparameters(**kept)
        else:
            hyperparameters = self._space.hyperparameters(trial.params)
            trial.set_user_attr("configuration", hyperparameters.as_dict())
        trial.set_user_attr("made_with", self._provenance)
        history = _history(trial)
        self._live[trial_id] = _Live(trial, history, len(history))
        return TrialOrder(trial.number, self._seed, hyperparameters).as_dict()

    def _sampler(self) -> optuna.samplers.BaseSampler:
        started = len(self._study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING)))
        seed = int(np.random.SeedSequence([self._seed, started]).generate_state(1)[0])
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=self._startup, multivariate=True, constant_liar=True
        )

    def record(self, trial_id: str, report: EpochReport) -> None:
        """Adds an epoch to the study, and earlier epochs that an interruption kept from it."""
        self._live[trial_id].record(report)

    def should_stop(self, trial_id: str) -> bool:
        """Whether the trial should stop after its last recorded epoch.

        The published configuration never stops early, because the search is compared with its result after all
        epochs. The pruner is still called for it, so that its rungs count for the other trials.
        """
        live = self._live[trial_id]
        live.stopped = live.trial.should_prune() and live.trial.number != BASELINE
        if live.stopped:
            live.end(Outcome.STOPPED, f"{Outcome.STOPPED.value} after epoch {len(live.history)}")
        return live.stopped

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Notes why a trial lost its slot, in case it cannot continue in another slot."""
        self._live[trial_id].failure = reason

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended, then deletes the trial's states on the storage."""
        live = self._live.pop(trial_id)
        failed = EpochReport(Outcome.FAILED, reason=live.failure)
        report: EpochReport = failed if error or result is None else result[REPORT]
        if not (live.stopped or report.is_last):
            return  # Tune ends, and the trial has not: in the study it stays a running one, which can be resumed
        outcome = Outcome.STOPPED if live.stopped else report.outcome
        if not live.stopped:
            live.record(report)  # Tune gives a trial's last epoch only to this method
            live.end(outcome, f"{outcome.value}: {report.reason}" if report.reason else outcome.value)
        self._tell(live.trial, outcome, live.history)
        with suppress(StorageError):  # a file that stays there is never read again
            delete_states(self._experiment, live.trial.number)

    def _tell(self, trial: Trial, outcome: Outcome, history: list[EpochFigures]) -> None:
        best = best_epoch(history)
        if outcome is Outcome.FAILED:
            self._study.tell(trial, state=TrialState.FAIL)
        elif outcome is Outcome.STOPPED:
            self._study.tell(trial, state=TrialState.PRUNED)
        elif outcome in (Outcome.DIVERGED, Outcome.OUT_OF_MEMORY) or best is None:
            self._study.tell(trial, BAD_SCORE)
        else:
            self._study.tell(trial, best.balanced_accuracy)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Does nothing: the state is in the study's storage."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration for Tuner.restore, which is not needed because of the study


def _history(trial: Trial) -> list[EpochFigures]:
    return [EpochFigures(**figures) for figures in trial.user_attrs.get("history", ())]


class OptunaScheduler(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler, which follows the study's pruner."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Whether the trial continues.

        Raises:
            NodeRefused: a slot's workers started on a node that cannot use the storage. The trials in the study stay
                as they are.
        """
        report: EpochReport = result[REPORT]
        if report.outcome is Outcome.REFUSED:
            raise NodeRefused(report.reason)
        self._searcher.record(trial.trial_id, report)
        stop = self._searcher.should_stop(trial.trial_id)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        error = trial.get_error()
        self._searcher.note_failure(trial.trial_id, str(error).strip().splitlines()[-1] if error else "unknown")
