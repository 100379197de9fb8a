"""A node that cannot use the storage of the search."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import ray
from optuna.trial import TrialState
from rich.console import Console
from trials import slot_plan

from lungct_tune.config.search_space import parse_space
from lungct_tune.display import Display
from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import NodeRefused
from lungct_tune.tuning import storage_check
from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.tuner import run_search

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_storage_is_tried_twice_before_a_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(str(tmp_path))
    monkeypatch.setattr(storage_check, "PROBE_PAUSE_S", 0.0)
    with pytest.raises(NodeRefused, match="do not see each other's files"):
        storage_check.check_from_here(experiment)
    monkeypatch.setattr(storage_check, "PROBE_PAUSE_S", 2.0)
    late = threading.Timer(0.5, experiment.write, (storage_check.PROBE, b""))
    late.start()
    storage_check.check_from_here(experiment)
    late.join()


def test_a_node_that_cannot_use_the_storage_ends_the_search_and_no_trial(tmp_path: Path, phantoms: Path) -> None:
    plan = slot_plan(tmp_path, phantoms, epochs=1, name="refused")
    study = optuna.create_study(direction="maximize")
    # as if the node had come when the search had begun: what it would write is in the way of itself
    (Path(plan.experiment.uri) / f".probe-{ray.get_runtime_context().get_node_id()}").mkdir(parents=True)
    space = parse_space("truncation_depth: {low: 1, high: 8}\n", "space.yaml")
    refused = pytest.raises(NodeRefused, match=rf"^node [\d.]+: {plan.experiment.uri}: cannot write \.probe-")
    with opened_mailbox("refused") as mailbox, refused:
        run_search(study, space, replace(plan, mailbox=mailbox), trials=2, slots=1, seed=0, display=Display(Console()))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert "ended" not in study.trials[0].user_attrs
