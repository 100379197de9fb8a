"""Opens the Optuna study of a search, and reads it as records of its trials. Does not need Ray.

A trial has these user attributes in addition to what Optuna keeps: "configuration" (its hyperparameters), "history"
(its epochs), "made_with" (versions and resources), "outcome", and "ended" (the outcome and its reason, as text).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace, is_within
from lungct_tune.errors import UserError
from lungct_tune.experiment.trial import UNSUCCESSFUL, EpochFigures, EpochReport, Outcome, TrialRecord, best_epoch
from lungct_tune.training.objective import OBJECTIVE_NAME

REDUCTION = 3
"""ASHA: the best third of the trials at a rung continues to three times as many epochs."""

BAD_SCORE = 0.0
"""The objective of a trial whose training diverged: the lowest possible balanced accuracy."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

FEWEST = 4
"""The fewest completed trials from which parameter importance is computed."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyError(UserError):
    """The Optuna study cannot be used. The message names study and storage and says what to do."""


def open_study(storage: str, name: str, space: SearchSpace, epochs: int, *, new: bool) -> optuna.Study:
    """Creates a study with the fixed trials enqueued, or opens the study of a resumed search.

    The study's pruner is asynchronous successive halving (Li et al., MLSys 2020) at the epochs of `rungs`. It is
    Optuna's and not Ray's: Ray's scheduler loses its rungs when the driver dies, Optuna keeps them in the storage.

    Raises:
        StudyError: the storage cannot be used, it has no such study, or the name of a new study is taken.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs(epochs)[0], reduction_factor=REDUCTION)
    where = f"{name!r} in {make_url(storage).render_as_string(hide_password=True)}"
    try:
        if not new:
            return optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", pruner=pruner)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise StudyError(f"there is a study {where} already; choose another --name") from error
    except KeyError as error:
        raise StudyError(f"there is no study {where}; give the --study that the search was started with") from error
    except (SQLAlchemyError, ImportError, ValueError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(f"the study {where} cannot be opened: {error}\nCheck --study") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([OBJECTIVE_NAME])  # what optuna-dashboard calls it
    for hyperparameters in space.fixed_trials:
        values = hyperparameters.as_dict()
        study.enqueue_trial(
            {parameter: values[parameter] for parameter in space.distributions},
            user_attrs={"configuration": values},
        )
    return study


def rungs(epochs: int) -> tuple[int, ...]:
    """The epochs after which a trial of at most `epochs` epochs may be stopped: about a ninth and a third of them.

    They are rounded up, so that no rung comes shortly before the end, where stopping saves nothing.
    """
    first = math.ceil(epochs / REDUCTION**2)
    return tuple(rung for rung in (first, first * REDUCTION) if rung < epochs) or (first,)


def read_trials(
    study: optuna.Study, states: Sequence[TrialState] = (*FINISHED, TrialState.RUNNING)
) -> list[TrialRecord]:
    """The trials that have started, in the order of their numbers."""
    trials = study.get_trials(deepcopy=False, states=states)
    return [_record(trial) for trial in trials if "configuration" in trial.user_attrs]


def finished_trials(study: optuna.Study) -> list[TrialRecord]:
    """The trials that have ended, with any outcome, in the order of their numbers."""
    return read_trials(study, FINISHED)


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    outcome = _outcome(trial)
    return TrialRecord(
        number=trial.number,
        hyperparameters=Hyperparameters(**attributes["configuration"]),
        history=tuple(EpochFigures(**figures) for figures in attributes.get("history", ())),
        outcome=outcome,
        ended=attributes.get("ended", outcome.value) if outcome is not Outcome.RUNNING else outcome.value,
        provenance=attributes.get("made_with", {}),
        started=trial.datetime_start,
        completed=trial.datetime_complete,
    )


def _outcome(trial: FrozenTrial) -> Outcome:
    """A trial's outcome. Older studies have no "outcome": there it follows from the state and "ended"."""
    if trial.state not in FINISHED:
        return Outcome.RUNNING
    if (kept := trial.user_attrs.get("outcome")) is not None:
        return Outcome(kept)
    if trial.state == TrialState.COMPLETE:
        return Outcome.COMPLETED if trial.user_attrs.get("ended") == Outcome.COMPLETED.value else Outcome.DIVERGED
    return Outcome.STOPPED if trial.state == TrialState.PRUNED else Outcome.FAILED


def over_seeds(reports: Sequence[EpochReport]) -> dict[str, Any]:
    """The balanced accuracy of one configuration trained with several seeds, each training at its best epoch.

    A training without a usable model counts with the lowest score, since a user of that configuration may get one.

    Args:
        reports: one for each training, with all its epochs.
    """
    best = [None if report.outcome in UNSUCCESSFUL else best_epoch(report.epochs) for report in reports]
    scores = [BAD_SCORE if figures is None else figures.balanced_accuracy for figures in best]
    return {"balanced_accuracy": scores, "mean": float(np.mean(scores)), "sd": float(np.std(scores, ddof=1))}


def effort(study: optuna.Study, trials: Sequence[TrialRecord], slots: int) -> dict[str, Any]:
    """The cost of a search, in trials, epochs and seconds.

    `overhead_ratio` is slot time divided by the seconds that slots spent inside epochs (training and validation).
    Slot time is slots x wall time, without the time in which slots waited for room on the cluster. It is summed over
    the runs of a resumed search, which may differ in their number of slots. A ratio of 1 means no overhead; None
    means that no epoch has ended.

    Args:
        trials: the trials that have ended.
    """
    training_s = sum(trial.seconds for trial in trials)
    return {
        "trials": len(trials),
        "epochs": sum(len(trial.history) for trial in trials),
        "wall_s": study.user_attrs.get("wall_s", 0.0),
        "training_s": training_s,
        "slots": slots,
        "overhead_ratio": study.user_attrs.get("slot_s", 0.0) / training_s if training_s else None,
        "ended": count_outcomes(trials),
    }


def count_outcomes(trials: Iterable[TrialRecord]) -> dict[str, int]:
    """The number of ended trials by outcome, the most frequent first."""
    return dict(Counter(trial.outcome.value for trial in trials if trial.is_finished).most_common())


def parameter_importance(
    trials: Iterable[TrialRecord], distributions: Mapping[str, BaseDistribution]
) -> dict[str, float]:
    """The importance of each parameter by fANOVA, the greatest first; empty if there are too few trials.

    Source: Hutter et al., ICML 2014; https://optuna.readthedocs.io, FanovaImportanceEvaluator.

    Args:
        trials: only completed trials inside the space are used.
        distributions: the parameters that were varied.
    """
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        values = {name: getattr(trial.hyperparameters, name) for name in distributions}
        inside = all(is_within(value, distributions[name]) for name, value in values.items())  # a fixed one may not be
        if trial.outcome is Outcome.COMPLETED and trial.best and inside:
            score = trial.best.balanced_accuracy
            study.add_trial(optuna.create_trial(params=values, distributions=dict(distributions), value=score))
    if len(study.trials) < FEWEST or len({trial.value for trial in study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
