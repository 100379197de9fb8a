"""The Optuna study of a search: opened, and what its trials have shown, read without Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.search_space import SearchSpace
from lungct_tune.errors import UserError
from lungct_tune.training.objective import OBJECTIVE, OBJECTIVE_SD, rank


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


def hyperparameters_of(trial: FrozenTrial) -> Hyperparameters:
    """What a trial trains or trained."""
    return Hyperparameters(**trial.user_attrs["configuration"])


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
        configuration = hyperparameters_of(trial)
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


def _tip(trial: FrozenTrial) -> str:
    figures = best_figures(trial)
    figure = f"{figures[OBJECTIVE]:.3f} at epoch {figures['epoch']:.0f}; " if figures else ""
    ended = trial.user_attrs.get("ended", "running")
    return f"trial {trial.number}: {figure}{ended}; {hyperparameters_of(trial)}"
