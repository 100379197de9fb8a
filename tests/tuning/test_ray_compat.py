"""Private names of Ray and Optuna: when a version moves one, this says which."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from ray.tune.search import Searcher
from ray_state import nothing_held

import lungct_tune
from lungct_tune.tuning.ray_compat import (
    HEAD_NODE,
    PlacementGroups,
    Private,
    reopen_trial,
    suggest_value,
    without_counting_a_dead_actor_twice,
    without_ending_actors_that_start,
    without_files_of_tune,
)


@pytest.mark.parametrize("name", list(Private))
def test_a_private_name_of_ray_is_where_it_was(name: Private) -> None:
    assert name.load() is not None


@pytest.mark.parametrize("method", ["_create_default_callbacks", "_initialize_and_run_controller"])
def test_a_trainer_of_ray_has_the_private_methods_that_ours_overrides(method: str) -> None:
    from lungct_tune.tuning.ray_trainer import SlotTrainer

    assert callable(getattr(Private.DATA_PARALLEL_TRAINER.load(), method))
    assert getattr(SlotTrainer, method) is not getattr(Private.DATA_PARALLEL_TRAINER.load(), method)


def test_a_slots_actor_imports_no_torch() -> None:
    """It would take 1.6 s of CPU and 250 MB of the head's memory for each slot."""
    imports = "import sys, lungct_tune.tuning.slots, lungct_tune.tuning.ray_trainer"
    subprocess.run([sys.executable, "-c", f"{imports}; sys.exit('torch' in sys.modules)"], check=True)


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


def test_tune_ends_no_actor_that_is_starting(cluster: None, tmp_path: Path) -> None:
    """Many slow slots and short trials: as many actors as slots, and no more."""
    from ray import tune

    started = tmp_path / "started"
    started.mkdir()

    class Slow(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            (started / uuid.uuid4().hex).touch()
            if len(list(started.iterdir())) > 1:  # the first is there at once, the others start for long
                time.sleep(2)

        def step(self) -> dict[str, Any]:
            return {"done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

    with without_files_of_tune(), without_ending_actors_that_start():
        tune.Tuner(
            tune.with_resources(Slow, tune.PlacementGroupFactory([{HEAD_NODE: 0.001}])),
            tune_config=tune.TuneConfig(
                search_alg=Nothing(), num_samples=40, max_concurrent_trials=4, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="slow",
                storage_path=str(tmp_path),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    assert len(list(started.iterdir())) == 4
    assert nothing_held()


def test_a_trial_whose_slot_dies_before_it_begins_is_run_all_the_same(cluster: None, tmp_path: Path) -> None:
    """Found: it counted as failed, in a search whose slots were killed at random."""
    from ray import tune

    died, searcher = tmp_path / "died", Nothing()

    class Dies(tune.Trainable):  # type: ignore[misc]
        def step(self) -> dict[str, Any]:
            return {"done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return True

    with without_files_of_tune(), without_ending_actors_that_start(), without_counting_a_dead_actor_twice():
        tune.Tuner(
            tune.with_resources(Dies, tune.PlacementGroupFactory([{HEAD_NODE: 0.001}])),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=4, max_concurrent_trials=1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="dies",
                storage_path=str(tmp_path),
                failure_config=tune.FailureConfig(max_failures=1),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    assert died.exists() and searcher.failed == [False] * 4
    assert nothing_held()


class Nothing(Searcher):  # type: ignore[misc]
    """Suggests the same nothing for each trial."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[bool] = []

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.failed.append(error)


def test_a_released_slot_makes_no_placement_group() -> None:
    """Found: a controller made one while its process was being killed, and it stayed for good."""
    groups = PlacementGroups("released")
    groups.close()
    with pytest.raises(RuntimeError, match="released has been released"):
        groups.make([{"CPU": 1}])


def test_ray_train_reads_the_variables_that_slots_set() -> None:
    from ray.train.v2._internal import constants

    from lungct_tune.tuning.slots import OF_RAY_TRAIN

    known = {value for name, value in vars(constants).items() if name.endswith("_ENV_VAR")}
    assert OF_RAY_TRAIN.keys() <= known
