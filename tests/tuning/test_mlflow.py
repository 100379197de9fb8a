"""Tracking with MLflow where it cannot be: what the user is told before a search begins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import optuna
import pytest

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.search import main
from lungct_tune.tuning.callbacks.mlflow import MLflowTracker, TrackingError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
def test_a_search_that_mlflow_cannot_track_is_refused_before_it_begins(
    tmp_path: Path, phantoms: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(phantoms), "--weights", "none", "--storage", str(tmp_path / "s"), "--image-size", "32"]
    assert main([*arguments, "--track", "mlflow:http://127.0.0.1:9"]) == 2
    assert "MLflow at http://127.0.0.1:9 cannot be used" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*/study.*"))


def test_without_mlflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match="uv pip install mlflow"):
        MLflowTracker("mlflow:http://127.0.0.1:9", "any", new=True)


@pytest.mark.long
def test_runs_that_the_user_has_added_to_the_experiment_are_left_alone(tmp_path: Path) -> None:
    """Found: after a resume, or after an error, such a run kept all data of the search from MLflow."""
    server = f"sqlite:///{tmp_path}/mlflow.db"
    client = pytest.importorskip("mlflow").MlflowClient(server)
    client.set_terminated(client.create_run(client.create_experiment("one"), run_name="my own").info.run_id)
    study = optuna.create_study()
    study.ask().set_user_attr("configuration", PUBLISHED.as_dict())
    MLflowTracker(f"mlflow:{server}", "one", new=False)._copy(study)
    (experiment,) = client.search_experiments(filter_string="name = 'one'")
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"my own", "trial_0000"}
