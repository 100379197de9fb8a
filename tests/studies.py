"""Reads the study in a search's folder, also while the search writes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import optuna

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import load_study, read_history
from lungct_tune.experiment.study_mirror import copy_study


def trials_in(experiment: Path | Experiment, name: str = "") -> list[optuna.trial.FrozenTrial]:
    """The trials of the study in an experiment's folder; none before there is a study."""
    if isinstance(experiment, Path):
        experiment = Experiment(str(experiment))
    with tempfile.TemporaryDirectory() as scratch:
        copy = copy_study(experiment, Path(scratch))
        try:
            return load_study(copy, name or experiment.name).trials if copy else []
        except KeyError:
            return []


def epochs_of(trial: optuna.trial.FrozenTrial) -> list[dict[str, Any]]:
    """The figures of a trial's epochs, as the study has them."""
    return [figures.as_dict() for figures in read_history(trial.user_attrs)[0]]
