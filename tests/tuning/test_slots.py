"""Slots: real Ray Train workers that take one trial after another."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from processes import wait_for
from ray.util.state import list_actors
from ray_state import nothing_held, train_workers
from trials import SHALLOW, comparable, epochs_of, order, slot_plan

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.trial import EpochReport, Outcome
from lungct_tune.training.objective import OBJECTIVE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lungct_tune.tuning.workers import SlotPlan

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 2


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[Any]:
    with running_slot(tmp_path_factory.mktemp("slots"), phantoms, folds=1, workers=1) as slot:
        yield slot


@contextmanager
def running_slot(folder: Path, phantoms: Path, folds: int, workers: int) -> Iterator[Any]:
    """A slot whose steps are single epochs, and that keeps a state of each."""
    from lungct_tune.tuning.shared_data import share_images
    from lungct_tune.tuning.slots import TuneSlot

    plan = slot_plan(folder, phantoms, epochs=EPOCHS, folds=folds, workers=workers)
    # as if they did not fit the object store: the workers map the file (test_search.py has them in the store)
    images = plan.dataset.images
    mapped = share_images(images, np.arange(len(images)), folder / "images.npy", room=0)
    assert np.array_equal(np.load(mapped), images)
    plan = replace(plan, dataset=replace(plan.dataset, images=mapped))

    class WithPlan(TuneSlot):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config, plan)

    made = WithPlan(order(0).as_dict())
    made.folder, made.plan = Path(plan.experiment.uri), plan
    try:
        yield made
    finally:
        made.stop()


def run(slot: Any, number: int, hyperparameters: Hyperparameters = SHALLOW) -> list[EpochReport]:
    assert slot.reset(order(number, hyperparameters).as_dict())
    reports = [step(slot)]
    while not reports[-1].is_last:
        reports.append(step(slot))
    return reports


def begin(slot: Any, number: int) -> None:
    """Trains the first epoch of a trial, and waits for its state."""
    slot.reset(order(number).as_dict())
    assert [figures.epoch for figures in step(slot).epochs] == [1]
    folder = slot.folder / "trials" / f"{number:04d}"
    wait_for(lambda: len(list(folder.glob("state-0001*.pt"))) == slot.plan.workers)


def step(slot: Any) -> EpochReport:
    """A step as Ray Tune has it done, and what it told Tune's own loggers."""
    result = slot.train()
    report: EpochReport = result["report"]
    assert result["done"] == report.is_last
    if report.epochs:
        last = report.epochs[-1]
        assert (result["training_iteration"], result[OBJECTIVE]) == (last.epoch, last.balanced_accuracy)
        assert last.slot is not None
    return report


# The tests of slots in actors come first, before this process has a slot of its own.


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> SlotPlan:
    """A plan whose trials take long, and keep a state only when they must."""
    plan = slot_plan(tmp_path_factory.mktemp("endless"), phantoms, epochs=2000)
    return replace(plan, rungs=(), checkpoint_interval=3600)


def living_actors() -> list[Any]:
    return [actor for actor in list_actors(detail=True, limit=10_000) if actor.state == "ALIVE"]


def slot_actor(plan: SlotPlan) -> Any:
    """A slot in an actor, as Ray Tune makes it, after a step of trial 0."""
    import ray
    from ray import tune

    from lungct_tune.tuning.slots import TuneSlot

    actor = ray.remote(num_cpus=0)(tune.with_parameters(TuneSlot, plan=plan)).remote(order(0).as_dict())
    report = ray.get(actor.step.remote())["report"]
    assert report.outcome is Outcome.RUNNING and len(report.epochs) > 1
    return actor


def test_a_slot_is_two_processes_and_saves_its_trial_when_it_is_released(endless: SlotPlan) -> None:
    import ray

    from lungct_tune.tuning.mailbox import opened_mailbox

    with opened_mailbox(endless.experiment.name):
        before = {actor.actor_id for actor in living_actors()}
        actor = slot_actor(endless)
        made = [actor for actor in living_actors() if actor.actor_id not in before and actor.class_name != "Mailbox"]
        assert len(made) == 2
        ray.get(actor.cleanup.remote())
        assert list(Path(endless.experiment.uri).glob("trials/0000/state-*.pt"))
        ray.kill(actor)


def test_a_killed_slot_leaves_no_worker_and_no_resources_held(endless: SlotPlan) -> None:
    import ray

    from lungct_tune.tuning.groups import remove_placement_groups
    from lungct_tune.tuning.mailbox import opened_mailbox

    with opened_mailbox(endless.experiment.name):
        ray.kill(slot_actor(endless))
        ray.kill(slot_actor(endless))  # which gets the number of the first, and its resources
        remove_placement_groups(f"{endless.experiment.name} slot")
    assert nothing_held()


def test_a_trial_run_fifth_gives_what_it_gave_first_and_a_diverging_one_ends_alone(slot: Any) -> None:
    first = run(slot, 0, SHALLOW)
    others = [Hyperparameters(truncation_depth=k, dropout=0.1) for k in (7, 1)]
    for number, hyperparameters in enumerate(others, start=1):
        assert [figures.epoch for figures in epochs_of(run(slot, number, hyperparameters))] == [1, 2]
    *_, diverged = run(slot, 3, Hyperparameters(truncation_depth=4, backbone_lr=1e18, head_lr=1e18))
    assert diverged.outcome is Outcome.DIVERGED and "epoch" in diverged.reason and not diverged.epochs
    fifth = run(slot, 4, SHALLOW)
    assert [*map(comparable, epochs_of(fifth))] == [*map(comparable, epochs_of(first))]
    assert all(report.cost and report.cost.images for report in fifth)
    assert sum(report.cost.checkpoint_bytes for report in fifth if report.cost)


def kill_a_worker() -> None:
    os.kill(train_workers()[0], signal.SIGKILL)


def test_a_killed_worker_is_replaced_and_costs_no_epoch_that_had_ended(slot: Any) -> None:
    whole = epochs_of(run(slot, 9))
    begin(slot, 12)
    kill_a_worker()
    report = step(slot)
    assert report.outcome is Outcome.COMPLETED
    assert [figures.epoch for figures in report.epochs] == [1, 2]  # the first for a study that may not know it yet
    assert report.epochs[-1].log_loss == whole[-1].log_loss


@pytest.mark.long
def test_a_worker_that_hangs_is_replaced(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.tuning.groups.HANG_MIN_S", 3.0)
    monkeypatch.setattr("lungct_tune.tuning.groups.HANG_EPOCHS", 0)
    begin(slot, 20)
    (worker,) = train_workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        assert step(slot).outcome is Outcome.COMPLETED
    finally:
        os.kill(worker, signal.SIGCONT)


def test_a_retraining_may_take_longer_than_workers_of_a_trial_may_be_silent(
    slot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second retraining of a slot was ended after ten minutes."""
    from lungct_tune.tuning.retrain import RetrainOrder

    run(slot, 24)
    monkeypatch.setattr("lungct_tune.tuning.groups.HANG_MIN_S", 0.0)
    monkeypatch.setattr("lungct_tune.tuning.groups.HANG_EPOCHS", 0)
    group, plan = slot._slot._group.id, slot.plan
    long = RetrainOrder(24, SHALLOW, seed=3, epochs=100, test=plan.dataset, checkpoint_interval=3600)
    assert slot._slot.run(long).outcome is Outcome.COMPLETED
    assert slot._slot._group.id == group


def test_a_storage_that_is_away_costs_time_and_no_trial(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.filesystem import StorageError

    begin(slot, 21)
    write, refusals = Experiment.write, iter(range(5))  # more than workers may be lost in a trial

    def refuse(self: Experiment, path: str, content: bytes) -> None:
        if next(refusals, None) is not None:
            raise StorageError("it does not answer")
        write(self, path, content)

    monkeypatch.setattr(Experiment, "write", refuse)
    monkeypatch.setattr("lungct_tune.tuning.slots.PAUSE_S", 0.1)
    monkeypatch.setattr("lungct_tune.tuning.slots.MAX_LOSSES", 1)
    kill_a_worker()  # a consequence of the storage, as if the worker had waited for it for too long
    report = step(slot)
    assert report.outcome is Outcome.COMPLETED and [figures.epoch for figures in report.epochs] == [1, 2]


def test_a_storage_is_tried_twice_before_a_node_is_refused(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.filesystem import NodeRefused
    from lungct_tune.tuning import workers

    experiment = Experiment(str(tmp_path))
    monkeypatch.setattr(workers, "PROBE_PAUSE_S", 0.0)
    with pytest.raises(NodeRefused, match="do not see each other's files"):
        workers.check_from_here(experiment)
    monkeypatch.setattr(workers, "PROBE_PAUSE_S", 2.0)
    late = threading.Timer(0.5, experiment.write, (workers.PROBE, b""))
    late.start()
    workers.check_from_here(experiment)
    late.join()


@pytest.mark.long
def test_a_mailbox_that_is_started_again_learns_which_nodes_are_left_alone(slot: Any) -> None:
    import ray

    begin(slot, 23)
    slot._slot._group.avoid.add("0" * 56)
    ray.kill(slot._slot._mailbox, no_restart=False)
    assert step(slot).outcome is Outcome.COMPLETED
    assert ray.get(slot._slot._mailbox.avoid.remote(set())) == {"0" * 56}


def test_the_loss_of_a_node_is_not_the_trials_fault(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    begin(slot, 22)
    group = slot._slot._group.id
    ray.get(slot._slot._mailbox.start.remote(group, "0" * 56))  # as if one of its workers were on a node that is gone
    monkeypatch.setattr("lungct_tune.tuning.slots.MAX_LOSSES", 1)
    kill_a_worker()
    assert step(slot).outcome is Outcome.COMPLETED


def test_a_trial_that_kills_its_workers_fails_alone(slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.tuning.slots.MAX_LOSSES", 1)
    slot.reset(order(13).as_dict() | {"seed": "no number"})
    failed = step(slot)
    assert failed.outcome is Outcome.FAILED
    assert failed.reason == "the workers ended: invalid literal for int() with base 10: 'no number'"  # no traceback
    assert [figures.epoch for figures in epochs_of(run(slot, 14, SHALLOW))] == [1, 2]


def test_a_node_that_cannot_use_the_storage_ends_the_search_and_no_trial(slot: Any) -> None:
    import optuna
    import ray
    from optuna.trial import TrialState
    from rich.console import Console

    from lungct_tune.config.search_space import parse_space
    from lungct_tune.display import Display
    from lungct_tune.filesystem import NodeRefused
    from lungct_tune.tuning.tuner import run_search

    slot.stop()  # its worker's CPU is needed
    study = optuna.create_study(direction="maximize")
    # as if the node had come when the search had begun: what it would write is in the way of itself
    (slot.folder / f".probe-{ray.get_runtime_context().get_node_id()}").mkdir()
    space = parse_space("truncation_depth: {low: 1, high: 8}\n", "space.yaml")
    with pytest.raises(NodeRefused, match=rf"^node [\d.]+: {slot.folder}: cannot write \.probe-"):
        run_search(study, space, slot.plan, trials=2, slots=1, seed=0, display=Display(Console()))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert "ended" not in study.trials[0].user_attrs


def test_an_order_does_not_overtake_the_opening_of_its_group(
    tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found under load: the first order was dropped, and slot and workers waited for each other without an end."""
    from lungct_tune.tuning import mailbox
    from lungct_tune.tuning.slots import Slot

    class SlowToOpen(mailbox.Mailbox):
        async def open(self, group: str) -> None:
            await asyncio.sleep(2)
            await super().open(group)

    monkeypatch.setattr(mailbox, "Mailbox", SlowToOpen)
    plan = slot_plan(tmp_path, phantoms, epochs=1)
    with mailbox.opened_mailbox(plan.experiment.name):
        slot = Slot(plan)
        try:
            assert slot.run(order(0)).is_last
        finally:
            slot.release()


@pytest.fixture(scope="module")
def slot_of_folds(slot: Any, tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[Any]:
    slot.stop()  # its worker's CPU is needed
    with running_slot(tmp_path_factory.mktemp("folds"), phantoms, folds=3, workers=2) as folds:
        yield folds


def test_a_trial_of_folds_is_worth_the_mean_of_models_that_never_saw_what_judges_them(slot_of_folds: Any) -> None:
    import torch

    from lungct_tune.training.objective import validation_figures
    from lungct_tune.training.trainer import Trainer

    epochs = epochs_of(run(slot_of_folds, 0, SHALLOW))
    plan = slot_of_folds.plan
    labels_N, threads = plan.dataset.labels_N, torch.get_num_threads()
    by_epoch: list[list[tuple[dict[str, float], np.ndarray]]] = [[] for _ in range(EPOCHS)]
    torch.set_num_threads(1)  # as the workers: sums of floats depend on it
    for fold in plan.folds:
        assert not set(fold.train_rows) & set(fold.valid_rows)
        alone = Trainer(
            SHALLOW,
            images_NHW=torch.from_numpy(np.load(plan.dataset.images)),
            labels_N=torch.from_numpy(labels_N.copy()),
            train_indices=fold.train_rows,
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
            probabilities_NC = alone.probabilities(fold.valid_rows)
            of_epoch.append((validation_figures(labels_N[fold.valid_rows], probabilities_NC), probabilities_NC))
    torch.set_num_threads(threads)
    for epoch, of_epoch in zip(epochs, by_epoch, strict=True):
        for name in (OBJECTIVE, "accuracy", "log_loss"):
            expected = np.mean([figures[name] for figures, _ in of_epoch])
            assert epoch.as_dict()[name] == pytest.approx(expected, abs=1e-12)
        spread = np.std([figures[OBJECTIVE] for figures, _ in of_epoch], ddof=1)
        assert epoch.balanced_accuracy_sd == pytest.approx(spread, abs=1e-12)
    kept = np.load(slot_of_folds.folder / "trials" / "0000" / "valid.npy")
    held_out = np.concatenate([fold.valid_rows for fold in plan.folds])
    assert sorted(held_out) == sorted(set(held_out))
    in_order = np.argsort(held_out)
    assert np.array_equal(kept, np.concatenate([probabilities_NC for _, probabilities_NC in by_epoch[-1]])[in_order])


@pytest.mark.long
def test_folds_of_a_lost_worker_go_on_from_their_last_epoch(slot_of_folds: Any) -> None:
    whole = epochs_of(run(slot_of_folds, 1))
    begin(slot_of_folds, 2)
    kill_a_worker()
    report = step(slot_of_folds)
    assert report.outcome is Outcome.COMPLETED
    assert [*map(comparable, report.epochs)] == [*map(comparable, whole)]
