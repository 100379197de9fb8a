"""Opens the Optuna study of a search, and reads it as records of its trials. Does not need Ray.

A trial has these user attributes in addition to what Optuna keeps: "configuration" (its hyperparameters), "history",
"history:1", "history:2" and so on (its epochs, see `read_history`), "made_with" (versions and resources), "outcome",
and "ended" (the outcome and its reason, as text).
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pydantic import FiniteFloat

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace, is_within
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import BundleError
from lungct_tune.experiment.form import check_form, written_by_a_search
from lungct_tune.experiment.metrics import Figure, SearchCost, SeedComparison, SeedScores
from lungct_tune.experiment.trial import UNUSABLE, EpochFigures, EpochReport, Outcome, TrialRecord
from lungct_tune.training.objective import OBJECTIVE_NAME

REDUCTION = 3
"""ASHA: the best third of the trials at a rung continues to three times as many epochs."""

HISTORY = "history"
"""The user attribute with the first epochs of a trial; a number follows in those with later epochs."""

BAD_SCORE = 0.0
"""The objective of a trial whose training diverged: the lowest possible balanced accuracy."""

LOCKED_S = 60.0
"""How long a change of a SQLite study waits for another program that has locked the file."""

PLANNED = "planned"
"""The user attribute with the forecast of a search: its range in seconds, the slowdown by other work, and its time."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

FEWEST = 4
"""The fewest completed trials from which parameter importance is computed."""


def study_errors() -> tuple[type[Exception], ...]:
    """What is raised when a database that holds a study does not answer, is locked or is full."""
    from sqlalchemy.exc import SQLAlchemyError  # here, and below, because a plan needs no database

    return SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError


optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyError(UserError):
    """The Optuna study cannot be used. The message names study and storage and says what to do."""


def rungs(epochs: int) -> tuple[int, ...]:
    """The epochs after which a trial of at most `epochs` epochs may be stopped: about a ninth and a third of them.

    Under 27 epochs it is only a third: after one or two epochs all trials are near chance. Rungs are rounded up, and
    none is in the last third of the epochs, where stopping saves little.
    """
    if epochs < REDUCTION**3:
        return (ceil(epochs / REDUCTION),)
    first = ceil(epochs / REDUCTION**2)
    return tuple(rung for rung in (first, first * REDUCTION) if rung * 3 <= epochs * 2)


def open_study(
    storage: str | BaseStorage, name: str, space: SearchSpace, epochs: int, *, new: bool, file: Path | None = None
) -> optuna.Study:
    """Creates a study with the fixed trials enqueued, or opens the study of a resumed search.

    The study's pruner is asynchronous successive halving (Li et al., MLSys 2020), which is asked at the `rungs`. It is
    Optuna's and not Ray's: Ray's scheduler loses its rungs when the driver dies, Optuna keeps them in the storage.

    Args:
        storage: an URL for Optuna, or an open storage.
        file: that of an open storage, for messages.

    Raises:
        StudyError: the storage cannot be used, it has no such study, or the name of a new study is taken.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs(epochs)[0], reduction_factor=REDUCTION)
    with _opened(storage, name, file) as opened:
        if not new:
            study = optuna.load_study(storage=opened, study_name=name, pruner=pruner)
            check_trials(study)
            return study
        study = optuna.create_study(storage=opened, study_name=name, direction="maximize", pruner=pruner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([OBJECTIVE_NAME])  # what optuna-dashboard calls it
    for hyperparameters in space.fixed_trials:
        values = hyperparameters.resolved.as_dict()
        study.enqueue_trial(
            {parameter: values[parameter] for parameter in space.distributions},
            user_attrs={"configuration": hyperparameters.as_dict()},
        )
    return study


def check_study(url: str, name: str, *, new: bool) -> None:
    """Checks, before any work, that `open_study` will find a database with such a study, or for a new one without it.

    Raises:
        StudyError: see `open_study`.
    """
    with _opened(url, name) as storage:
        is_there = name in optuna.get_all_study_names(storage)
        if new and is_there:
            raise optuna.exceptions.DuplicatedStudyError
        if not new and not is_there:
            raise KeyError(name)


@contextmanager
def _opened(storage: str | BaseStorage, name: str, file: Path | None = None) -> Iterator[BaseStorage]:
    from sqlalchemy.engine import make_url

    where = f"{name!r} in {file}" if file else repr(name)
    refusals: tuple[type[Exception], ...] = (*study_errors(), ImportError, ValueError)
    try:
        if isinstance(storage, str):
            where += f" in {make_url(storage).render_as_string(hide_password=True)}"
            waits = {"timeout": LOCKED_S} if make_url(storage).get_backend_name() == "sqlite" else {}
            storage = RDBStorage(storage, {"connect_args": waits})
        yield storage
    except optuna.exceptions.DuplicatedStudyError as error:
        raise name_taken(where) from error
    except KeyError as error:
        remedy = "restore that file" if file else "give the --study that the search was started with"
        raise StudyError(f"there is no study {where}; {remedy}") from error
    except refusals as error:
        raise StudyError(f"the study {where} cannot be opened: {error}\nCheck --study") from error


def name_taken(where: str) -> StudyError:
    """The error for a new search whose study is there already."""
    return StudyError(
        f"there is a study {where} already, though no search of that name is in the --storage: its start may have "
        "failed. Choose another --name, or delete that study if nobody needs it"
    )


@contextmanager
def told_as_user_errors(where: str) -> Iterator[None]:
    """Turns errors of the study's database into errors for the user.

    Args:
        where: the study's URL or file.

    Raises:
        StudyError: the database is locked or full, does not answer, or refuses.
    """
    try:
        yield
    except study_errors() as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Optuna's error does not say more than that there is one
            cause = cause.__cause__
        locked = f" for {LOCKED_S:.0f} s; close the program that has it open" if "locked" in str(cause) else ""
        raise StudyError(f"the study in {where} cannot be used: {str(cause).strip()}{locked}") from error


def load_study(file: Path, name: str) -> optuna.Study:
    """Opens a copy of a study, a journal or a SQLite database, to read it.

    Raises:
        KeyError: it has no study of that name.
        ValueError, SQLAlchemyError, StorageInternalError: it is damaged.
    """
    if file.suffix == ".db":
        return optuna.load_study(storage=sqlite_storage(file), study_name=name)
    return optuna.load_study(storage=JournalStorage(JournalFileBackend(str(file))), study_name=name)


def sqlite_storage(file: Path) -> BaseStorage:
    """Opens a SQLite database, in a folder of any name: in a URL, % and ? and { would mean something else."""
    from sqlalchemy.pool import NullPool

    return RDBStorage(
        "sqlite://",
        {"creator": lambda: sqlite3.connect(file, timeout=LOCKED_S, check_same_thread=False), "poolclass": NullPool},
    )


def read_trials(
    study: optuna.Study,
    states: Sequence[TrialState] = (*FINISHED, TrialState.RUNNING),
    without: Container[int] = (),
) -> list[TrialRecord]:
    """The trials that have started, in the order of their numbers.

    Args:
        without: numbers of trials that are left out.
    """
    trials = study.get_trials(deepcopy=False, states=states)
    started = (trial for trial in trials if trial.number not in without and "configuration" in trial.user_attrs)
    return [trial_record(trial) for trial in started]


def check_trials(study: optuna.Study) -> None:
    """Checks the attributes of all trials, which others may have written.

    Raises:
        BundleError: one has another form than a search writes; the message names trial and attribute.
    """
    for trial in study.get_trials(deepcopy=False):
        where, attributes = f"the study, trial {trial.number}", trial.user_attrs
        for name in (name for name in attributes if name.partition(":")[0] == HISTORY):
            if not check_form(attributes[name], list[EpochFigures], f"{where}, {name}"):
                raise BundleError(f"{where}, {name}: it has no epochs; restore the study")
        if "configuration" in attributes:
            with written_by_a_search(f"{where}, configuration"):
                values = check_form(attributes["configuration"], dict[str, FiniteFloat], f"{where}, configuration")
                Hyperparameters(**values)
        check_form(attributes.get("outcome", Outcome.RUNNING), Outcome, f"{where}, outcome")
        check_form(attributes.get("ended", ""), str, f"{where}, ended")
        check_form(attributes.get("made_with", {}), dict[str, Any], f"{where}, made_with")


def finished_trials(study: optuna.Study) -> list[TrialRecord]:
    """The trials that have ended, with any outcome, in the order of their numbers."""
    return read_trials(study, FINISHED)


def read_history(attributes: Mapping[str, Any]) -> tuple[list[EpochFigures], int]:
    """A trial's epochs, from its user attributes, and the number of attributes that they are in.

    Each step of a slot adds an attribute with its epochs. If it repeats epochs after an interruption, they replace the
    earlier ones and all that followed those.
    """
    history: list[EpochFigures] = []
    count = 0
    while (step := attributes.get(history_key(count))) is not None:
        epochs = [EpochFigures(**figures) for figures in step]
        history = [figures for figures in history if figures.epoch < epochs[0].epoch] + epochs
        count += 1
    return history, count


def history_key(count: int) -> str:
    """The user attribute for the next epochs of a trial that has `count` of them."""
    return f"{HISTORY}:{count}" if count else HISTORY


def trial_record(trial: FrozenTrial) -> TrialRecord:
    """Reads a trial of the study that has started."""
    attributes = trial.user_attrs
    outcome = _outcome(trial)
    return TrialRecord(
        number=trial.number,
        hyperparameters=Hyperparameters(**attributes["configuration"]),
        history=tuple(read_history(attributes)[0]),
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


def compare_seeds(winner: Sequence[EpochReport], published: Sequence[EpochReport] = ()) -> SeedComparison:
    """The balanced accuracy of the winner trained with several seeds, and of the published configuration with the same.

    A training that diverged or ran out of memory counts with the lowest score, since a user of that configuration may
    get one.

    Args:
        winner: a report for each training, with all its epochs; none has failed, which says nothing of a configuration.
        published: for the same seeds in the same order; empty if the winner is the published configuration.
    """
    from scipy.stats import t  # here, because a report of a search without seeds needs no scipy

    ours, theirs = _scores(winner), _scores(published)
    if not theirs:
        return SeedComparison(ours, *_spread(ours))
    differences = np.subtract(ours, theirs)
    n, mean, interval = len(differences), float(differences.mean()), None
    if n > 1 and not np.allclose(differences, differences[0]):
        reach = float(t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
        interval = mean - reach, mean + reach
    return SeedComparison(ours, *_spread(ours), SeedScores(theirs, *_spread(theirs)), Figure(mean, interval))


def _scores(reports: Sequence[EpochReport]) -> list[float]:
    return [BAD_SCORE if report.outcome in UNUSABLE else report.epochs[-1].balanced_accuracy for report in reports]


def _spread(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def search_cost(study: optuna.Study, trials: Sequence[TrialRecord], slots: int) -> SearchCost:
    """The cost of a search.

    Args:
        trials: the trials that have ended.
        slots: of the last run.
    """
    training_s = sum(trial.seconds for trial in trials)
    planned_s, took_s = planned_and_taken(study) or (None, None)
    return SearchCost(
        trials=len(trials),
        epochs=sum(len(trial.history) for trial in trials),
        wall_s=study.user_attrs.get("wall_s", 0.0),
        training_s=training_s,
        slots=slots,
        overhead_ratio=study.user_attrs.get("slot_s", 0.0) / training_s if training_s else None,
        ended=count_outcomes(trials),
        planned_s=planned_s,
        took_s=took_s,
    )


def planned_and_taken(study: optuna.Study) -> tuple[tuple[float, float], float] | None:
    """The range that was forecast for the search, and the time since then, in seconds; None without a forecast."""
    if not (planned := study.user_attrs.get(PLANNED)):
        return None
    low, high = planned["seconds"]
    return (low, high), time.time() - planned["began"]


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
        if trial.outcome is Outcome.COMPLETED and trial.last and inside:
            score = trial.last.balanced_accuracy
            study.add_trial(optuna.create_trial(params=values, distributions=dict(distributions), value=score))
    if len(study.trials) < FEWEST or len({trial.value for trial in study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
