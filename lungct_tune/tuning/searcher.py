"""Ray Tune's searcher and scheduler for an Optuna study. The study has the whole state of a search.

Ray's own `OptunaSearch` reports trials that a scheduler stopped as complete (with the value of a shorter
budget), and its state is in a pickle that is not always up to date. Here every epoch is written to the study
as an intermediate value, and a trial that was stopped early is PRUNED. So the search can continue from the
study's storage after any crash.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import Trial, TrialState
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.errors import SearchStopped
from lungct_tune.experiment.folder import STATE, TRIALS, Experiment, delete_states, trial_folder
from lungct_tune.experiment.study import (
    BAD_SCORE,
    FINISHED,
    finished_trials,
    history_key,
    read_history,
    rungs,
    trial_record,
)
from lungct_tune.experiment.study_journal import StudyStorage
from lungct_tune.experiment.trial import BASELINE, STATES, EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused, StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.ray_compat import reopen_trial, report_value, storage_of, suggest_value
from lungct_tune.tuning.sampler import SearchSampler
from lungct_tune.tuning.slots import ORDER, REPORT
from lungct_tune.tuning.tally import SearchTally

MAX_FAILED_IN_A_ROW = 5
"""How many trials may fail one after the other before the search ends, because it cannot be their fault."""


@dataclass
class _Live:
    """A running trial: Optuna's handle on it, and the epochs that the study has."""

    trial: Trial
    stopped: bool = False
    at_rung: bool = False
    """Whether one of the last recorded epochs is a rung."""
    failure: str = "unknown"
    """The last error; the trial may have recovered from it."""

    def __post_init__(self) -> None:
        self.history, self._steps = read_history(self.trial.user_attrs)

    def record(self, report: EpochReport) -> None:
        """Adds the report's epochs to the study. Epochs that were repeated replace the earlier ones."""
        known = {(figures.epoch, figures.at) for figures in self.history}
        new = [figures for figures in report.epochs if (figures.epoch, figures.at) not in known]
        if not new:
            return
        for figures in new:
            report_value(self.trial, figures.epoch, figures.balanced_accuracy)
        self.history = [figures for figures in self.history if figures.epoch < new[0].epoch] + new
        self.trial.set_user_attr(history_key(self._steps), [figures.as_dict() for figures in new])
        self._steps += 1

    def end(self, outcome: Outcome, ended: str) -> None:
        """Notes in the study how the trial ended. This comes before `tell`, because a driver may die in between."""
        self.trial.set_user_attr("ended", ended)
        self.trial.set_user_attr("outcome", outcome.value)  # the last one: with it the trial counts as ended


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher for an Optuna study.

    A suggestion depends on the seed, the trial's number, the results in the study and `startup`. It does not depend on
    interruptions of the search, unless the search continues with so many more or fewer trials that `startup` changes.

    Args:
        epochs: of a trial that is not stopped early.
        startup: how many trials Optuna draws at random before TPE starts.
        storage_threads: deletes files on the experiment's storage, so that the search does not wait for it.
        provenance: noted in the study for every trial that starts or continues.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        experiment: Experiment,
        *,
        epochs: int,
        seed: int,
        startup: int,
        storage_threads: Executor,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._study, self._space, self._experiment, self._seed = study, space, experiment, seed
        self._rungs, self._provenance = set(rungs(epochs)), dict(provenance or {})
        self._storage_threads = storage_threads
        self._live: dict[str, _Live] = {}
        self._failed: list[tuple[_Live, str]] = []
        """Trials that have failed one after the other. If it is not their fault, they are not told to the study."""
        self._interrupted: deque[Trial] = deque()
        self.tally = SearchTally(finished_trials(study))
        ended = study.get_trials(deepcopy=False, states=FINISHED)
        self._sampler = study.sampler = SearchSampler(space.distributions, ended, seed=seed, startup=startup)
        with _without_warnings():
            running = [
                reopen_trial(study, trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            ]
        if ended:
            storage_threads.submit(self._delete_left_states, {trial.number for trial in ended})
        for trial in running:
            if (outcome := trial.user_attrs.get("outcome")) is None:
                self._interrupted.append(trial)
            else:  # it had ended, but the driver died before `tell`
                self._tell(_Live(trial), Outcome(outcome))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The order for Ray's next trial. Trials that an interruption left running come first."""
        with _without_warnings():
            trial = self._interrupted.popleft() if self._interrupted else self._study.ask()
            for name, distribution in self._space.distributions.items():
                suggest_value(trial, name, distribution)  # also those that a crash during an earlier call left out
        if (kept := trial.user_attrs.get("configuration")) is not None:
            hyperparameters = Hyperparameters(**kept)
        else:
            hyperparameters = self._space.hyperparameters(trial.params)
            trial.set_user_attr("configuration", hyperparameters.as_dict())
        trial.set_user_attr("made_with", self._provenance)
        self._live[trial_id] = _Live(trial)
        weights_from = None if trial.number == BASELINE else self.tally.weights_from
        return {ORDER: TrialOrder(trial.number, self._seed, hyperparameters, weights_from)}

    def record(self, trial_id: str, report: EpochReport) -> None:
        """Adds a step's epochs to the study, and earlier epochs that an interruption kept from it."""
        self._live[trial_id].record(report)
        self._live[trial_id].at_rung = any(figures.epoch in self._rungs for figures in report.epochs)

    def should_stop(self, trial_id: str) -> bool:
        """Whether the trial should stop after its last recorded epoch: ASHA decides only at rungs.

        The published configuration never stops early, because the search is compared with its result after all
        epochs. The pruner is still called for it, so that its rungs count for the other trials.
        """
        live = self._live[trial_id]
        live.stopped = live.at_rung and live.trial.should_prune() and live.trial.number != BASELINE
        if live.stopped:
            live.end(Outcome.STOPPED, f"{Outcome.STOPPED.value} after epoch {len(live.history)}")
        return live.stopped

    def note_failure(self, trial_id: str, reason: str) -> None:
        """Notes why a trial lost its slot, in case it cannot continue in another slot."""
        self._live[trial_id].failure = reason

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study how a trial ended. Files that are not needed any more are deleted in another thread."""
        live = self._live.pop(trial_id)
        failed = EpochReport(Outcome.FAILED, reason=live.failure)
        report: EpochReport = failed if error or result is None else result[REPORT]
        if not (live.stopped or report.is_last):
            return  # Tune ends, and the trial has not: in the study it stays a running one, which can be resumed
        outcome = Outcome.STOPPED if live.stopped else report.outcome
        if not live.stopped:
            live.record(report)  # Tune gives a trial's last step only to this method
        if outcome is Outcome.FAILED:
            self._failed.append((live, report.reason))
            if len(self._failed) == MAX_FAILED_IN_A_ROW:
                raise SearchStopped(
                    f"{MAX_FAILED_IN_A_ROW} trials in a row have lost their workers again and again, so the search "
                    f"ends. They are trained again when it continues. The last one: {report.reason}\n"
                    "Fix the cause first; --verbose prints what Ray says about it"
                )
            return
        self.tell_failed()
        if not live.stopped:
            live.end(outcome, f"{outcome.value}: {report.reason}" if report.reason else outcome.value)
        self._tell(live, outcome)

    def tell_failed(self) -> None:
        """Tells the study of trials that have failed by their own fault, since another trial has ended well."""
        for live, reason in self._failed:
            live.end(Outcome.FAILED, f"{Outcome.FAILED.value}: {reason}")
            self._tell(live, Outcome.FAILED)
        self._failed.clear()

    def _tell(self, live: _Live, outcome: Outcome) -> None:
        state, score = TrialState[STATES[outcome]], None
        if state is TrialState.COMPLETE:
            is_usable = outcome is Outcome.COMPLETED and live.history
            score = live.history[-1].balanced_accuracy if is_usable else BAD_SCORE
        ended = self._study.tell(live.trial, score, state)
        self._sampler.add(ended)
        not_kept = self.tally.add(trial_record(ended))
        self._storage_threads.submit(self._clean_up, ended.number, not_kept)

    def _clean_up(self, ended: int, not_kept: int | None) -> None:
        """Deletes the states of a trial that has ended, and the files of one whose weights are not kept any more."""
        self._sync()
        with suppress(StorageError):  # a file that stays there is never read again
            if not_kept is not None:
                self._experiment.delete_folder(trial_folder(not_kept))
            if not_kept != ended:
                delete_states(self._experiment, ended)

    def _sync(self) -> None:
        """A search that is resumed must know which trials have ended, before their states are gone."""
        storage = storage_of(self._study)
        if isinstance(storage, StudyStorage):
            storage.sync()

    def _delete_left_states(self, ended: set[int]) -> None:
        """Deletes states of ended trials that a driver left when it died."""
        self._sync()
        with suppress(StorageError):
            for path in self._experiment.files(TRIALS):
                number = path.split("/")[1]
                if path.endswith(STATE) and number.isdigit() and int(number) in ended:
                    self._experiment.delete(path)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Does nothing: the state is in the study's storage."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration for Tuner.restore, which is not needed because of the study


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides Optuna's warnings of what is intended: experimental arguments, and fixed trials outside the ranges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
