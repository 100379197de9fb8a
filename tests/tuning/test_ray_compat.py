"""Private names of Ray and Optuna: when a version moves one, this says which."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution
from ray.train.torch import TorchTrainer

import lungct_tune
from lungct_tune.tuning.ray_compat import PRIVATE_NAMES, private, reopen_trial, suggest_value


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_private_name_of_ray_is_where_it_was(name: str) -> None:
    assert private(name) is not None


def test_a_torch_trainer_makes_its_callbacks_where_ours_leaves_one_out() -> None:
    from lungct_tune.tuning.ray_trainer import GroupTrainer

    assert callable(TorchTrainer._create_default_callbacks)
    assert GroupTrainer._create_default_callbacks is not TorchTrainer._create_default_callbacks


def test_a_trial_of_optuna_that_was_left_running_can_be_reopened() -> None:
    study = optuna.create_study()
    left = study.ask()
    (running,) = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    trial = reopen_trial(study, running)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert suggest_value(trial, "depth", IntDistribution(3, 3)) == 3
    study.tell(trial, 1.0)
    assert study.trials[left.number].params == {"depth": 3} and study.best_value == 1.0


def test_no_other_module_uses_private_names() -> None:
    package = Path(lungct_tune.__file__).parent
    private_name = re.compile(r"\b_(private|internal)\b|\._trial_id|\._suggest\b")
    users = {path.name for path in package.rglob("*.py") if private_name.search(path.read_text())}
    assert users == {"ray_compat.py"}
