"""Whole searches on a GPU, as a user starts them: four slots on one GPU, out of memory, killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from devices import CUDA
from processes import searching, wait_for
from studies import epochs_of, trials_in

from lungct_tune.experiment.bundle import verify
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.results import read_results
from lungct_tune.experiment.study import BAD_SCORE
from lungct_tune.experiment.trial import Outcome

if TYPE_CHECKING:
    from lungct_tune.experiment.trial import TrialRecord

pytestmark = pytest.mark.long

SPACE = """
truncation_depth: {low: 1, high: 8}
backbone_lr: {low: 1e-4, high: 1e-2, log: true}
fixed_trials: [{truncation_depth: 4}]
"""
DEEP_AND_SHALLOW = """
truncation_depth: {low: 1, high: 49}
fixed_trials: [{truncation_depth: 49}, {truncation_depth: 1}]
"""
ON_GPU = ["--gpus-per-worker", "0.25", "--cpus-per-worker", "0.5", "--slots", "4"]


@pytest.fixture(params=[pytest.param(ON_GPU, marks=CUDA.marks, id="cuda")])
def resources(request: pytest.FixtureRequest) -> list[str]:
    return list(request.param)


def own_ray(**more: str) -> dict[str, str]:
    """An environment in which a search starts a Ray of its own, with all that the machine has."""
    return {**os.environ, "RAY_ADDRESS": "local", **more}


def begin(folder: Path, phantoms: Path, space: str, *arguments: str) -> list[str]:
    (folder / "space.yaml").write_text(space)
    small = ["--weights", "none", "--image-size", "32", "--batch-size", "8", "--final-workers", "1", "--folds", "1"]
    where = ["--storage", str(folder), "--name", "one", "--data", str(phantoms), "--space", str(folder / "space.yaml")]
    return [*where, *small, *arguments]


def trials_of(folder: Path) -> list[TrialRecord]:
    return read_results(Experiment.at(str(folder), "one")).trials


def assert_done(folder: Path, trials: int, epochs: int) -> None:
    """All trials that were asked for, none twice, each epoch once and in order; and a whole bundle."""
    found = trials_of(folder)
    assert [trial.number for trial in found] == list(range(trials))
    for trial in found:
        assert trial.outcome in (Outcome.COMPLETED, Outcome.STOPPED)
        assert [figures.epoch for figures in trial.history] == list(range(1, len(trial.history) + 1))
        assert len(trial.history) == epochs or trial.outcome is Outcome.STOPPED
    verify(folder / "one" / "best")


def running_epochs(folder: Path, least: int) -> int:
    """Epochs of trials that run, of this number or above."""
    running = [trial for trial in trials_in(folder / "one") if not trial.state.is_finished() and trial.number >= least]
    return sum(len(epochs_of(trial)) for trial in running)


def test_slots_share_one_gpu(resources: list[str], tmp_path: Path, phantoms: Path) -> None:
    asked = ["--trials", "8", "--epochs", "6", *resources]
    with searching(*begin(tmp_path, phantoms, SPACE, *asked), environment=own_ray()) as run:
        output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert_done(tmp_path, trials=8, epochs=6)
    slots = int(resources[-1])
    assert f"{slots} slots of 1 worker with 0.5 CPU" in output
    assert len({figures.slot for trial in trials_of(tmp_path) for figures in trial.history}) == slots


def test_a_search_that_is_killed_is_resumed(resources: list[str], tmp_path: Path, phantoms: Path) -> None:
    asked = ["--trials", "10", "--epochs", "18", "--checkpoint-interval", "0", *resources]
    with searching(*begin(tmp_path, phantoms, SPACE, *asked), environment=own_ray()) as run:
        wait_for(lambda: running_epochs(tmp_path, least=3), run)
        run.kill()
        run.communicate()
    before = {trial.number for trial in trials_of(tmp_path) if trial.is_finished}
    with searching("--storage", str(tmp_path), "--resume", "one", environment=own_ray()) as run:
        output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert before and len(before) < 10
    assert_done(tmp_path, trials=10, epochs=18)


def test_a_state_is_written_beside_training_and_a_killed_trial_goes_on_from_it(
    resources: list[str], tmp_path: Path, phantoms: Path
) -> None:
    epochs = 600  # long enough for a state
    asked = ["--trials", "1", "--epochs", str(epochs), "--checkpoint-interval", "1", *resources[:-1], "1"]
    with searching(*begin(tmp_path, phantoms, SPACE, *asked), environment=own_ray()) as run:
        wait_for(lambda: list((tmp_path / "one" / "trials" / "0000").glob("state-*.pt")), run)
        wait_for(lambda: running_epochs(tmp_path, least=0), run)
        run.kill()
        run.communicate()
    (before,) = trials_of(tmp_path)
    assert before.outcome is Outcome.RUNNING
    with searching("--storage", str(tmp_path), "--resume", "one", environment=own_ray()) as run:
        output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert_done(tmp_path, trials=1, epochs=epochs)
    (after,) = trials_of(tmp_path)
    assert before.history[0].at == after.history[0].at  # the time of day: it was not trained again


@pytest.mark.parametrize("gpu", [CUDA])
def test_a_model_too_large_for_the_gpu_gets_a_bad_score_and_the_search_goes_on(
    gpu: str, tmp_path: Path, phantoms: Path
) -> None:
    share = 400 * 2**20 / torch.cuda.mem_get_info(0)[1]  # 400 MiB: the whole network and Adam need more
    limited = own_ray(PYTORCH_CUDA_ALLOC_CONF=f"per_process_memory_fraction:{share:.6f}")
    asked = ["--trials", "4", "--epochs", "1", "--batch-size", "32", "--image-size", "128"]
    asked += ["--gpus-per-worker", "1", "--slots", "1"]
    with searching(*begin(tmp_path, phantoms, DEEP_AND_SHALLOW, *asked), environment=limited) as run:
        output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    deep, shallow, *_ = trials_of(tmp_path)
    assert deep.outcome is Outcome.OUT_OF_MEMORY and "memory" in deep.ended and not deep.history
    assert shallow.outcome is Outcome.COMPLETED
    assert trials_in(tmp_path / "one")[deep.number].value == BAD_SCORE
