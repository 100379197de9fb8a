"""Slots: real Ray Train workers that take one trial after another."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.util.state import list_actors

from lungct_tune.configuration import Configuration
from lungct_tune.evaluation import OBJECTIVE

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 2
SHALLOW = Configuration(truncation_depth=4, backbone_lr=1e-3)


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[Any]:
    from lungct_tune.data import read_images, split_images
    from lungct_tune.experiment import Experiment
    from lungct_tune.tuning.material import Material, share
    from lungct_tune.tuning.slots import Slot, SlotPlan

    folder = tmp_path_factory.mktemp("slots")
    images = read_images(phantoms, 32, progress=False)
    split = split_images(images, "grouped", seed=0)
    # as if they did not fit the object store: the workers map the file (test_search.py has them in the store)
    mapped = share(images.images_NHW, np.arange(len(split)), folder / "images.npy", room=0)
    assert np.array_equal(np.load(mapped), images.images_NHW)
    plan = SlotPlan(
        experiment=Experiment.at(str(folder), "one"),
        material=Material(
            images=mapped,
            labels_N=images.table["label"].to_numpy(),
            classes=len(images.classes),
            backbone=None,
            normalisation="unit",
            batch_size=8,
            epochs=EPOCHS,
        ),
        train_indices=np.flatnonzero(split == "train"),
        valid_indices=np.flatnonzero(split == "valid"),
        workers=1,
        resources_per_worker={"CPU": 1},
    )

    class WithPlan(Slot):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, plan)

    made = WithPlan(order(0, SHALLOW))
    made.folder = Path(plan.experiment.uri)
    yield made
    made.stop()


def order(number: int, configuration: Configuration) -> dict[str, Any]:
    return {"number": number, "seed": 3, "configuration": configuration.as_dict()}


def run(slot: Any, number: int, configuration: Configuration) -> list[dict[str, Any]]:
    assert slot.reset(order(number, configuration))
    results = [slot.train()]
    while not results[-1]["done"]:
        results.append(slot.train())
    return results


def test_a_trial_run_fifth_gives_what_it_gave_first_and_a_diverging_one_ends_alone(slot: Any) -> None:
    figures = ("epoch", OBJECTIVE, "accuracy", "log_loss", "train_loss")
    first = run(slot, 0, SHALLOW)
    others = [Configuration(truncation_depth=k, dropout=0.1) for k in (7, 1)]
    for number, configuration in enumerate(others, start=1):
        assert [result["epoch"] for result in run(slot, number, configuration)] == [1, 2]
    *_, diverged = run(slot, 3, Configuration(truncation_depth=4, backbone_lr=1e18, head_lr=1e18))
    assert "epoch" in diverged["diverged"] and diverged[OBJECTIVE] == 0
    fifth = run(slot, 4, SHALLOW)
    assert [[r[f] for f in figures] for r in fifth] == [[r[f] for f in figures] for r in first]


def test_the_kept_weights_are_those_of_the_best_epoch(slot: Any) -> None:
    from safetensors import safe_open

    from lungct_tune.evaluation import rank

    results = run(slot, 5, SHALLOW)
    best = max(results, key=rank)
    with safe_open(slot.folder / "trials" / "0005" / "best.safetensors", "pt") as file:
        assert int(file.metadata()["epoch"]) == best["epoch"]
        assert float(file.metadata()[OBJECTIVE]) == best[OBJECTIVE]


def test_a_trial_goes_on_from_its_last_epoch(slot: Any) -> None:
    whole = run(slot, 6, SHALLOW)
    slot.reset(order(7, SHALLOW))
    assert slot.train()["epoch"] == 1
    run(slot, 8, Configuration(truncation_depth=1))  # something else takes the slot
    slot.reset(order(7, SHALLOW))
    result = slot.train()
    assert (result["epoch"], result["done"]) == (2, True)
    assert [earlier["epoch"] for earlier in result["earlier"]] == [1]
    assert result["log_loss"] == whole[-1]["log_loss"]


def test_a_state_of_another_study_is_not_taken_for_the_trials_own(slot: Any) -> None:
    slot.reset(order(10, SHALLOW))
    assert slot.train()["epoch"] == 1
    run(slot, 11, SHALLOW)
    slot.reset(order(10, Configuration(truncation_depth=4, backbone_lr=2e-3)))
    assert slot.train()["epoch"] == 1


def kill_the_worker() -> None:
    (worker,) = [a for a in list_actors(detail=True) if a.class_name == "RayTrainWorker" and a.state == "ALIVE"]
    os.kill(worker.pid, signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_costs_no_epoch_that_had_ended(slot: Any) -> None:
    whole = run(slot, 9, SHALLOW)
    slot.reset(order(12, SHALLOW))
    assert slot.train()["epoch"] == 1
    kill_the_worker()
    result = slot.train()
    assert (result["epoch"], result["done"]) == (2, True)
    assert [earlier["epoch"] for earlier in result["earlier"]] == [1]  # for a study that may not know it yet
    assert result["log_loss"] == whole[-1]["log_loss"]


def test_a_trial_that_kills_its_workers_fails_alone(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.tuning.slots.MAX_LOSSES", 1)
    slot.reset(order(13, SHALLOW) | {"seed": "no number"})
    assert "the workers ended" in slot.train()["failed"]
    assert [result["epoch"] for result in run(slot, 14, SHALLOW)] == [1, 2]
