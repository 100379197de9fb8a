"""Slots: real Ray Train workers that take one trial after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ray.util.state import list_actors

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.training.objective import OBJECTIVE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 2
SHALLOW = Hyperparameters(truncation_depth=4, backbone_lr=1e-3)


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[Any]:
    with running_slot(tmp_path_factory.mktemp("slots"), phantoms, folds=1, workers=1) as slot:
        yield slot


@contextmanager
def running_slot(folder: Path, phantoms: Path, folds: int, workers: int) -> Iterator[Any]:
    from lungct_tune.data import fold_images, read_images, split_images
    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.tuning.shared_data import SharedDataset, share
    from lungct_tune.tuning.slots import TuneSlot
    from lungct_tune.tuning.trial_runner import Fold
    from lungct_tune.tuning.workers import SlotPlan

    images = read_images(phantoms, 32, progress=False)
    split = split_images(images, "grouped", seed=0)
    # as if they did not fit the object store: the workers map the file (test_search.py has them in the store)
    mapped = share(images.images_NHW, np.arange(len(split)), folder / "images.npy", room=0)
    assert np.array_equal(np.load(mapped), images.images_NHW)
    searched = np.flatnonzero(split != "test")
    fold_N = fold_images(images, searched, folds, seed=0) if folds > 1 else (split[searched] != "valid").astype(int)
    plan = SlotPlan(
        experiment=Experiment.at(str(folder), "one"),
        material=SharedDataset(
            images=mapped,
            labels_N=images.table["label"].to_numpy(),
            classes=len(images.classes),
            backbone=None,
            normalisation="unit",
            batch_size=8,
            epochs=EPOCHS,
        ),
        folds=tuple(Fold(searched[fold_N != k], searched[fold_N == k]) for k in range(folds)),
        workers=workers,
        resources_per_worker={"CPU": 1},
    )

    class WithPlan(TuneSlot):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, plan)

    made = WithPlan(order(0, SHALLOW))
    made.folder, made.plan = Path(plan.experiment.uri), plan
    try:
        yield made
    finally:
        made.stop()


def order(number: int, configuration: Hyperparameters) -> dict[str, Any]:
    return {"number": number, "seed": 3, "configuration": configuration.as_dict()}


def run(slot: Any, number: int, configuration: Hyperparameters) -> list[dict[str, Any]]:
    assert slot.reset(order(number, configuration))
    results = [slot.train()]
    while not results[-1]["done"]:
        results.append(slot.train())
    return results


def test_a_trial_run_fifth_gives_what_it_gave_first_and_a_diverging_one_ends_alone(slot: Any) -> None:
    figures = ("epoch", OBJECTIVE, "accuracy", "log_loss", "train_loss")
    first = run(slot, 0, SHALLOW)
    others = [Hyperparameters(truncation_depth=k, dropout=0.1) for k in (7, 1)]
    for number, configuration in enumerate(others, start=1):
        assert [result["epoch"] for result in run(slot, number, configuration)] == [1, 2]
    *_, diverged = run(slot, 3, Hyperparameters(truncation_depth=4, backbone_lr=1e18, head_lr=1e18))
    assert "epoch" in diverged["diverged"] and diverged[OBJECTIVE] == 0
    fifth = run(slot, 4, SHALLOW)
    assert [[r[f] for f in figures] for r in fifth] == [[r[f] for f in figures] for r in first]


def test_the_kept_weights_are_those_of_the_best_epoch(slot: Any) -> None:
    from safetensors import safe_open

    from lungct_tune.training.objective import rank

    results = run(slot, 5, SHALLOW)
    best = max(results, key=rank)
    with safe_open(slot.folder / "trials" / "0005" / "best.safetensors", "pt") as file:
        assert int(file.metadata()["epoch"]) == best["epoch"]
        assert float(file.metadata()[OBJECTIVE]) == best[OBJECTIVE]


def test_a_trial_goes_on_from_its_last_epoch(slot: Any) -> None:
    whole = run(slot, 6, SHALLOW)
    slot.reset(order(7, SHALLOW))
    assert slot.train()["epoch"] == 1
    run(slot, 8, Hyperparameters(truncation_depth=1))  # something else takes the slot
    slot.reset(order(7, SHALLOW))
    result = slot.train()
    assert (result["epoch"], result["done"]) == (2, True)
    assert [earlier["epoch"] for earlier in result["earlier"]] == [1]
    assert result["log_loss"] == whole[-1]["log_loss"]


def test_a_state_of_another_study_is_not_taken_for_the_trials_own(slot: Any) -> None:
    slot.reset(order(10, SHALLOW))
    assert slot.train()["epoch"] == 1
    run(slot, 11, SHALLOW)
    slot.reset(order(10, Hyperparameters(truncation_depth=4, backbone_lr=2e-3)))
    assert slot.train()["epoch"] == 1


def test_a_damaged_state_costs_the_epochs_that_it_held_and_not_the_trial(slot: Any) -> None:
    slot.reset(order(15, SHALLOW))
    assert slot.train()["epoch"] == 1
    run(slot, 16, SHALLOW)
    state = slot.folder / "trials" / "0015" / "last.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    assert [result["epoch"] for result in run(slot, 15, SHALLOW)] == [1, 2]


def kill_a_worker() -> None:
    worker, *_ = [
        a for a in list_actors(detail=True, limit=10_000) if a.class_name == "RayTrainWorker" and a.state == "ALIVE"
    ]
    os.kill(worker.pid, signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_costs_no_epoch_that_had_ended(slot: Any) -> None:
    whole = run(slot, 9, SHALLOW)
    slot.reset(order(12, SHALLOW))
    assert slot.train()["epoch"] == 1
    kill_a_worker()
    result = slot.train()
    assert (result["epoch"], result["done"]) == (2, True)
    assert [earlier["epoch"] for earlier in result["earlier"]] == [1]  # for a study that may not know it yet
    assert result["log_loss"] == whole[-1]["log_loss"]


def test_a_trial_that_kills_its_workers_fails_alone(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.tuning.slots.MAX_LOSSES", 1)
    slot.reset(order(13, SHALLOW) | {"seed": "no number"})
    assert "the workers ended" in slot.train()["failed"]
    assert [result["epoch"] for result in run(slot, 14, SHALLOW)] == [1, 2]


def test_a_node_that_cannot_use_the_storage_ends_the_search_and_no_trial(slot: Any) -> None:
    import optuna
    import ray
    from optuna.trial import TrialState
    from rich.console import Console

    from lungct_tune.config.search_space import parse_space
    from lungct_tune.tuning.tuner import run_search
    from lungct_tune.tuning.workers import NodeRefused

    slot.stop()  # its worker's CPU is needed
    study = optuna.create_study(direction="maximize")
    # as if the node had come when the search had begun: what it would write is in the way of itself
    (slot.folder / f".probe-{ray.get_runtime_context().get_node_id()}").mkdir()
    space = parse_space("truncation_depth: {low: 1, high: 8}\n", "space.yaml")
    with pytest.raises(NodeRefused, match=rf"^node [\d.]+: {slot.folder}: cannot write \.probe-"):
        run_search(study, space, slot.plan, trials=2, slots=1, seed=0, console=Console(), callbacks=[])
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert "ended" not in study.trials[0].user_attrs


def test_only_the_searchs_own_groups_of_workers_are_counted_as_waiting(tmp_path: Path) -> None:
    from ray.util import placement_group, remove_placement_group

    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.tuning.slots import waiting_for_room
    from lungct_tune.tuning.workers import SlotPlan

    plan: Any = SlotPlan(Experiment(str(tmp_path)), None, (), 2, {"CPU": 50.0})  # type: ignore[arg-type]
    of_another = "import ray; ray.init(); ray.util.placement_group([{'CPU': 50}] * 2).wait(1); print('waits'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", of_another], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as other:
        assert other.stdout and other.stdout.readline() == b"waits\n"
        assert waiting_for_room(plan) == 0
        group = placement_group([{"CPU": 50}] * 2)
        group.wait(1)
        assert waiting_for_room(plan) == 1
        remove_placement_group(group)
        other.kill()


def test_groups_of_workers_wait_for_nodes_for_a_week_in_slots_as_in_the_retraining() -> None:
    from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    assert int(os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR]) == 7 * 24 * 3600
    assert WORKER_GROUP_START_TIMEOUT_S_ENV_VAR in ENV_VARS_TO_PROPAGATE  # which Tune tells the slots' actors


@pytest.fixture(scope="module")
def slot_of_folds(slot: Any, tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[Any]:
    slot.stop()  # its worker's CPU is needed
    with running_slot(tmp_path_factory.mktemp("folds"), phantoms, folds=3, workers=2) as folds:
        yield folds


def test_a_trial_of_folds_is_worth_the_mean_of_models_that_never_saw_what_judges_them(slot_of_folds: Any) -> None:
    import torch

    from lungct_tune.training.objective import OBJECTIVE_SD, rank, validation_figures
    from lungct_tune.training.trainer import Trainer

    results = run(slot_of_folds, 0, SHALLOW)
    plan = slot_of_folds.plan
    labels_N, threads = plan.material.labels_N, torch.get_num_threads()
    by_epoch: list[list[tuple[dict[str, float], np.ndarray]]] = [[] for _ in range(EPOCHS)]
    torch.set_num_threads(1)  # as the workers: sums of floats depend on it
    for fold in plan.folds:
        assert not set(fold.train_indices) & set(fold.valid_indices)
        alone = Trainer(
            SHALLOW,
            images_NHW=torch.from_numpy(np.load(plan.material.images)),
            labels_N=torch.from_numpy(labels_N.copy()),
            train_indices=fold.train_indices,
            classes=4,
            epochs=EPOCHS,
            batch_size=8,
            seed=3,
            normalisation="unit",
            backbone_state=None,
            device="cpu",
        )
        for of_epoch in by_epoch:
            alone.train_epoch()
            probabilities_NC = alone.probabilities(fold.valid_indices)
            of_epoch.append((validation_figures(labels_N[fold.valid_indices], probabilities_NC), probabilities_NC))
    torch.set_num_threads(threads)
    for result, of_epoch in zip(results, by_epoch, strict=True):
        for name in (OBJECTIVE, "accuracy", "log_loss"):
            assert result[name] == pytest.approx(np.mean([figures[name] for figures, _ in of_epoch]), abs=1e-12)
        assert result[OBJECTIVE_SD] == pytest.approx(np.std([f[OBJECTIVE] for f, _ in of_epoch], ddof=1), abs=1e-12)
    best = by_epoch[int(max(results, key=rank)["epoch"]) - 1]
    kept = np.load(slot_of_folds.folder / "trials" / "0000" / "valid.npy")
    held_out = np.concatenate([fold.valid_indices for fold in plan.folds])
    assert sorted(held_out) == sorted(set(held_out))
    in_order = np.argsort(held_out)
    assert np.array_equal(kept, np.concatenate([probabilities_NC for _, probabilities_NC in best])[in_order])


def test_folds_of_a_lost_worker_go_on_from_their_last_epoch(slot_of_folds: Any) -> None:
    whole = run(slot_of_folds, 1, SHALLOW)
    slot_of_folds.reset(order(2, SHALLOW))
    assert slot_of_folds.train()["epoch"] == 1
    ahead = slot_of_folds.folder / "trials" / "0002" / "last-1.pt"
    behind = ahead.read_bytes()
    kill_a_worker()
    result = slot_of_folds.train()
    assert (result["epoch"], result["done"], result["log_loss"]) == (2, True, whole[-1]["log_loss"])
    assert ahead.read_bytes() != behind
    # as if the workers had been lost when one of them had kept the second epoch and the others had not
    for kept in ("last.pt", "last-2.pt"):
        (slot_of_folds.folder / "trials" / "0002" / kept).unlink()
    kill_a_worker()
    results = run(slot_of_folds, 2, SHALLOW)
    assert [[r[f] for f in ("epoch", OBJECTIVE, "log_loss")] for r in results] == [
        [r[f] for f in ("epoch", OBJECTIVE, "log_loss")] for r in whole
    ]
