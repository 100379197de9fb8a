"""The Optuna study as the one memory of a search: what Ray Tune asks, reports and stops goes through it.

Ray ships `OptunaSearch`, but it tells trials that a scheduler stopped as complete (with the value of a
shorter budget) and keeps its state in a pickle that lags behind. Here every epoch is an intermediate value
in the study's storage the moment it is known, a trial stopped early is PRUNED, and what the storage holds is
enough to go on with the search after any crash.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lungct_tune.config.hyperparameters import Configuration
from lungct_tune.errors import UserError
from lungct_tune.filesystem import StorageError
from lungct_tune.training.objective import OBJECTIVE, OBJECTIVE_SD, rank
from lungct_tune.tuning.trial import state_file
from lungct_tune.tuning.workers import NodeRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ray.tune.experiment import Trial as RayTrial

    from lungct_tune.config.search_space import SearchSpace
    from lungct_tune.experiment import Experiment


class StudyError(UserError):
    """The Optuna study cannot be used: the message names study and storage and says what to do."""


BASELINE = 0
"""The number of the first trial of every study: the published configuration."""

EPOCH_FIGURES = (
    "epoch",
    OBJECTIVE,
    "accuracy",
    "log_loss",
    "train_loss",
    "train_s",
    "valid_s",
    OBJECTIVE_SD,
)
"""What a slot reports of an epoch, and the study keeps; the last only with folds."""

WHEN_AND_WHERE = ("at", "slot")
"""What the study keeps of an epoch beside its figures: when it ended, in seconds since 1970, and in which slot."""

REDUCTION = 3
"""ASHA: the best third of the trials at a rung goes on to three times as many epochs."""

COMPLETED, STOPPED, DIVERGED, FAILED = "completed", "stopped early", "diverged", "failed"
"""How a trial ends, as its user attribute "ended" begins; after the last three follows when or why."""

BAD_SCORE = 0.0
"""The objective of a trial whose training diverged: no balanced accuracy is lower."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(storage: str, name: str, space: SearchSpace, epochs: int, *, new: bool) -> optuna.Study:
    """Creates a study with the fixed trials waiting to be first, or opens the one that a resumed search began.

    Stops trials by asynchronous successive halving (Li et al., MLSys 2020), with rungs at a ninth and a
    third of the epochs. It is Optuna's pruner and not Ray's scheduler because that one forgets its rungs
    when the driver dies; Optuna's are in the storage.

    Raises:
        StudyError: the storage cannot be used, has no such study, or has one that this search did not begin.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, round(epochs / REDUCTION**2)), reduction_factor=REDUCTION
    )
    where = f"{name!r} in {make_url(storage).render_as_string(hide_password=True)}"
    try:
        if not new:
            return optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", pruner=pruner)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise StudyError(f"there is a study {where} already; choose another --name") from error
    except KeyError as error:
        raise StudyError(f"there is no study {where}; give the --study that the search was begun with") from error
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(f"the study {where} cannot be opened: {error}\nCheck --study") from error
    for configuration in space.fixed_trials:
        values = configuration.as_dict()
        study.enqueue_trial(
            {parameter: values[parameter] for parameter in space.distributions},
            user_attrs={"configuration": values},
        )
    return study


@dataclass
class _Live:
    """A trial that runs: Optuna's handle on it and what the study has been told."""

    trial: Trial
    history: list[dict[str, float]] = field(default_factory=list)
    failure: str = "unknown"
    """The last thing that went wrong; a trial may have recovered from it."""


class StudySearch(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher over an Optuna study.

    A suggestion depends on the seed, the trial's number and what the study's trials have shown, not on how
    often the search was interrupted on the way there.

    Args:
        startup: how many trials Optuna draws at random before TPE has enough to learn from.
        folds: how many models a trial trains, each of which keeps a state.
        made_with: noted of every trial that begins or goes on.
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
        made_with: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._study, self._space, self._experiment, self._seed = study, space, experiment, seed
        self._startup, self._folds, self._made_with = startup, folds, dict(made_with or {})
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


class StudyPruning(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler that does what the study's pruner says."""

    def __init__(self, search: StudySearch) -> None:
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


def configuration_of(trial: FrozenTrial) -> Configuration:
    """What a trial trains or trained."""
    return Configuration(**trial.user_attrs["configuration"])


def how_ended(trial: FrozenTrial) -> str:
    """COMPLETED, STOPPED, DIVERGED or FAILED; "running" for a trial that has not ended."""
    ended = trial.user_attrs.get("ended", FAILED if trial.state in FINISHED else "running")
    return next(how for how in (COMPLETED, STOPPED, DIVERGED, FAILED, "running") if ended.startswith(how))


def best_figures(trial: FrozenTrial) -> dict[str, float]:
    """The figures of a trial's best epoch, the first of several equals; none where no epoch ended."""
    return max(trial.user_attrs.get("history", []), key=rank, default={})


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended, however they did, in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def best_trial(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """Of the trials that ran to their end without diverging, the one with the best epoch; the first of equals.

    One that was stopped early may have shown a better epoch, but in the middle of its schedule, at a high learning
    rate, where neighbouring epochs differ by luck.
    """
    completed = [trial for trial in trials if trial.state == TrialState.COMPLETE and how_ended(trial) == COMPLETED]
    return max(completed, key=lambda trial: rank(best_figures(trial)), default=None)


def over_seeds(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The objective of one configuration trained with several seeds, each at its best epoch as a trial is.

    A training that diverged or failed counts with the worst score: it is what a user of that configuration may get.
    """
    histories = [[*answer["earlier"], answer] for answer in answers]
    scores = [max(history, key=rank)[OBJECTIVE] if "epoch" in history[-1] else BAD_SCORE for history in histories]
    return {OBJECTIVE: scores, "mean": float(np.mean(scores)), "sd": float(np.std(scores, ddof=1))}


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row a trial: number, state, why it ended, epochs, configuration, best epoch's figures, seconds."""
    rows = []
    for trial in finished_trials(study):
        history = trial.user_attrs.get("history", [])
        configuration = configuration_of(trial)
        best = best_figures(trial)
        rows.append(
            {"trial": trial.number, "state": trial.state.name, "ended": trial.user_attrs.get("ended", "")}
            | configuration.as_dict()
            | {"frozen_depth": configuration.frozen_depth, "epochs": len(history)}
            | {f"best_{key}": best.get(key) for key in ("epoch", OBJECTIVE, "accuracy", "log_loss")}
            | {f"best_{key}": best[key] for key in (OBJECTIVE_SD,) if key in best}
            | {"training_s": sum(figures["train_s"] + figures["valid_s"] for figures in history)}
        )
    return pd.DataFrame(rows)


def row_of(table: pd.DataFrame, number: int) -> dict[str, Any] | None:
    """One trial's row of the table, as plain values; None for a trial that did not come to an epoch's end."""
    rows = table[table["trial"] == number].dropna(subset=[f"best_{OBJECTIVE}"])
    return None if rows.empty else dict(json.loads(rows.iloc[0].to_json(double_precision=15)))


def effort(study: optuna.Study, table: pd.DataFrame, slots: int) -> dict[str, Any]:
    """What a search cost, in trials, epochs and seconds.

    `overhead_ratio` is slots x wall time (less the time in which slots waited for room on the cluster, and added
    up, if a resumed search had another number of slots) over the seconds in which slots were inside an epoch of
    training or validation: 1 where they did nothing else, None where they never were.
    """
    wall_s, slot_s = study.user_attrs.get("wall_s", 0.0), study.user_attrs.get("slot_s", 0.0)
    training_s = float(table["training_s"].sum())
    return {
        "trials": len(table),
        "epochs": int(table["epochs"].sum()),
        "wall_s": wall_s,
        "training_s": training_s,
        "slots": slots,
        "overhead_ratio": slot_s / training_s if training_s else None,
        "ended": dict(Counter(map(how_ended, finished_trials(study))).most_common()),
    }
