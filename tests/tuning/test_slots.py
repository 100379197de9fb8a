"""Slots: real Ray Train workers that take one trial after another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
from processes import wait_for
from ray import tune
from ray.util.state import list_actors
from ray_state import train_workers
from trials import SHALLOW, comparable, epochs_of, order, slot_plan

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport, Outcome
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.retrain import RetrainOrder
from lungct_tune.tuning.shared_data import SharedDataset, share_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lungct_tune.tuning.slot_plan import SlotPlan

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 2


class InActor:
    """A slot in an actor, as Ray Tune makes it, which keeps trial 0 until it gets another one.

    Args:
        plan: with an experiment of another name than that of other slots.
    """

    def __init__(self, plan: SlotPlan) -> None:
        from lungct_tune.tuning.mailbox import opened_mailbox
        from lungct_tune.tuning.slots import TuneSlot

        with ExitStack() as held:
            self.mailbox = plan.mailbox or held.enter_context(opened_mailbox(plan.experiment.name))
            self.end_mailbox = held.pop_all().close
        self.plan, self.folder = replace(plan, mailbox=self.mailbox), Path(plan.experiment.uri)
        made = ray.remote(num_cpus=0)(tune.with_parameters(TuneSlot, plan=self.plan))
        self.actor: Any = made.remote({"order": order(0)})

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in the slot's process, with Ray Tune's side of the slot and these arguments."""
        return ray.get(self.actor.__ray_call__.remote(function, *arguments))

    @contextmanager
    def changed(self, where: str, **values: Any) -> Iterator[None]:
        """Names of a module or a class that have other values in the slot's process."""

        def change(_: Any, values: dict[str, Any]) -> dict[str, Any]:
            place = resolve_name(where)
            before = {name: getattr(place, name) for name in values}
            for name, value in values.items():
                setattr(place, name, value)
            return before

        before = self.call(change, values)
        try:
            yield
        finally:
            self.call(change, before)

    def stop(self) -> None:
        self.call(lambda slot: slot.stop())
        ray.kill(self.actor)
        self.end_mailbox()


@pytest.fixture(scope="module", params=[(1, 1)])
def slot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[InActor]:
    """A slot whose steps are single epochs, and that keeps a state of each. Its parameter: folds, and workers."""
    folder, (folds, workers) = tmp_path_factory.mktemp("slots"), request.param
    plan = slot_plan(folder, phantoms, epochs=EPOCHS, folds=folds, workers=workers, name=folder.name)
    # as if they did not fit the object store: the workers map the file (test_search.py has them in the store)
    images = plan.dataset.images
    mapped = share_images(images, np.arange(len(images)), folder / "images.npy", room=0)
    assert np.array_equal(np.load(mapped), images)
    made = InActor(replace(plan, dataset=replace(plan.dataset, images=mapped)))
    try:
        yield made
    finally:
        made.stop()


of_folds = pytest.mark.parametrize("slot", [(3, 2)], indirect=True)
"""With a slot of two workers, whose trials have three folds."""


def run(slot: InActor, number: int, hyperparameters: Hyperparameters = SHALLOW) -> list[EpochReport]:
    assign(slot, number, hyperparameters)
    reports = [step(slot)]
    while not reports[-1].is_last:
        reports.append(step(slot))
    return reports


def assign(slot: InActor, number: int, hyperparameters: Hyperparameters = SHALLOW, **changes: Any) -> None:
    """Gives the slot a trial, as Ray Tune does."""
    trial = replace(order(number, hyperparameters), **changes)
    assert slot.call(lambda it: it.reset({"order": trial}))


def begin(slot: InActor, number: int) -> None:
    """Trains the first epoch of a trial, and waits for its state."""
    assign(slot, number)
    assert [figures.epoch for figures in step(slot).epochs] == [1]
    folder = slot.folder / "trials" / f"{number:04d}"
    wait_for(lambda: len(list(folder.glob("state-0001*.pt"))) == slot.plan.workers)


def step(slot: InActor) -> EpochReport:
    """A step as Ray Tune has it done."""
    result = slot.call(lambda it: it.train())
    report: EpochReport = result["report"]
    assert result["done"] == report.is_last
    if report.epochs:
        last = report.epochs[-1]
        assert result[OBJECTIVE] == last.balanced_accuracy
        assert last.slot is not None
    return report


@pytest.fixture
def endless(tmp_path: Path, phantoms: Path) -> SlotPlan:
    """A plan whose trials take long, and keep a state only when they must."""
    plan = slot_plan(tmp_path, phantoms, epochs=2000, name=tmp_path.name)
    return replace(plan, rungs=(), checkpoint_interval=3600)


def processes() -> set[str]:
    """The actors that live, without mailboxes."""
    living = list_actors(detail=True, limit=10_000, filters=[("state", "=", "ALIVE")])
    return {actor.actor_id for actor in living if actor.class_name != "Mailbox"}


def stepped(plan: SlotPlan) -> InActor:
    """A slot after a step of trial 0."""
    slot = InActor(plan)
    report = step(slot)
    assert report.outcome is Outcome.RUNNING and len(report.epochs) > 1
    return slot


def test_a_slot_is_two_processes_and_saves_its_trial_when_it_is_released(endless: SlotPlan) -> None:
    before = processes()
    slot = stepped(endless)
    assert len(processes() - before) == 2
    slot.stop()
    assert list(slot.folder.glob("trials/0000/state-*.pt"))


def test_the_next_step_is_trained_before_it_is_ordered_and_dropped_if_another_trial_is(endless: SlotPlan) -> None:
    slot = stepped(endless)
    assign(slot, 1)
    epochs = [figures.epoch for figures in step(slot).epochs]
    assert epochs == list(range(1, len(epochs) + 1))
    slot.stop()
    (state,) = slot.folder.glob("trials/*/state-*.pt")
    assert state.parent.name == "0001" and int(state.name[6:10]) > epochs[-1]


def test_a_killed_slot_leaves_no_worker_and_no_resources_held(endless: SlotPlan) -> None:
    from lungct_tune.tuning.groups import remove_placement_groups

    before, free = processes(), ray.available_resources()["CPU"]
    killed = stepped(endless)
    ray.kill(killed.actor)
    ray.kill(stepped(killed.plan).actor)  # which gets the number of the first, and its resources
    remove_placement_groups(f"{endless.experiment.name} slot")
    wait_for(lambda: processes() == before and ray.available_resources().get("CPU") == free, within_s=90)
    killed.end_mailbox()


def test_a_trial_run_fifth_gives_what_it_gave_first_and_a_diverging_one_ends_alone(slot: InActor) -> None:
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


def test_a_killed_worker_is_replaced_and_costs_no_epoch_that_had_ended(slot: InActor) -> None:
    whole = epochs_of(run(slot, 9))
    begin(slot, 12)
    kill_a_worker()
    report = step(slot)
    assert report.outcome is Outcome.COMPLETED
    assert [figures.epoch for figures in report.epochs] == [1, 2]  # the first for a study that may not know it yet
    assert report.epochs[-1].log_loss == whole[-1].log_loss


@pytest.mark.long
def test_a_worker_that_hangs_is_replaced(slot: InActor) -> None:
    begin(slot, 20)
    (worker,) = train_workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        with slot.changed("lungct_tune.tuning.groups", HANG_MIN_S=3.0, HANG_EPOCHS=0):
            assert step(slot).outcome is Outcome.COMPLETED
    finally:
        with suppress(ProcessLookupError):  # it has been killed, although it was stopped
            os.kill(worker, signal.SIGCONT)


def test_a_retraining_may_take_longer_than_workers_of_a_trial_may_be_silent(slot: InActor) -> None:
    """The second retraining of a slot was ended after ten minutes."""

    class Slow(SharedDataset):
        def images_on(self, device: torch.device) -> torch.Tensor:
            time.sleep(3)
            return super().images_on(device)

    run(slot, 24)
    group = group_of(slot)
    long = RetrainOrder(24, SHALLOW, seed=3, test=Slow(**vars(slot.plan.dataset)))
    with slot.changed("lungct_tune.tuning.groups", HANG_MIN_S=0.0, HANG_EPOCHS=0):
        assert slot.call(lambda it: it._slot.run(long)).outcome is Outcome.COMPLETED
    assert group_of(slot) == group


def group_of(slot: InActor) -> str:
    return str(slot.call(lambda it: it._slot._group.id))


def test_a_storage_that_is_away_costs_time_and_no_trial(slot: InActor) -> None:
    from lungct_tune.filesystem import StorageError

    begin(slot, 21)
    write, refusals = Experiment.write, iter(range(5))  # more than workers may be lost in a trial

    def refuse(self: Experiment, path: str, content: bytes) -> None:
        if next(refusals, None) is not None:
            raise StorageError("it does not answer")
        write(self, path, content)

    kill_a_worker()  # a consequence of the storage, as if the worker had waited for it for too long
    with (
        slot.changed("lungct_tune.experiment.folder:Experiment", write=refuse),
        slot.changed("lungct_tune.tuning.slots", PAUSE_S=0.1, MAX_LOSSES=1),
    ):
        report = step(slot)
    assert report.outcome is Outcome.COMPLETED and [figures.epoch for figures in report.epochs] == [1, 2]


@pytest.mark.long
def test_a_mailbox_that_is_started_again_learns_which_nodes_are_left_alone(slot: InActor) -> None:
    begin(slot, 23)
    slot.call(lambda it: it._slot._group.avoid.add("0" * 56))
    ray.kill(slot.mailbox, no_restart=False)
    assert step(slot).outcome is Outcome.COMPLETED
    assert ray.get(slot.mailbox.avoid.remote(set())) == {"0" * 56}


def test_the_loss_of_a_node_is_not_the_trials_fault(slot: InActor) -> None:
    begin(slot, 22)
    # as if one of its workers were on a node that is gone
    ray.get(slot.mailbox.start.remote(group_of(slot), "0" * 56))
    kill_a_worker()
    with slot.changed("lungct_tune.tuning.slots", MAX_LOSSES=1):
        assert step(slot).outcome is Outcome.COMPLETED


def test_a_trial_that_kills_its_workers_fails_alone(slot: InActor) -> None:
    assign(slot, 13, seed="no number")
    with slot.changed("lungct_tune.tuning.slots", MAX_LOSSES=1):
        failed = step(slot)
    assert failed.outcome is Outcome.FAILED
    assert failed.reason == "the workers ended: invalid literal for int() with base 10: 'no number'"  # no traceback
    assert [figures.epoch for figures in epochs_of(run(slot, 14, SHALLOW))] == [1, 2]


def test_an_order_does_not_overtake_the_opening_of_its_group(
    tmp_path: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found under load: the first order was dropped, and slot and workers waited for each other without an end."""
    from lungct_tune.tuning import mailbox
    from lungct_tune.tuning.slot_actor import SlotActor

    class SlowToOpen(mailbox.Mailbox):
        async def open(self, group: str) -> None:
            await asyncio.sleep(2)
            await super().open(group)

    monkeypatch.setattr(mailbox, "Mailbox", SlowToOpen)
    with mailbox.opened_mailbox("slow") as slow:
        slot = SlotActor(slot_plan(tmp_path, phantoms, epochs=1, name="slow", mailbox=slow))
        assert ray.get(slot.run(order(0))).is_last
        slot.end()


@of_folds
def test_a_trial_of_folds_is_worth_the_mean_of_models_that_never_saw_what_judges_them(slot: InActor) -> None:
    import torch

    from lungct_tune.training.objective import validation_figures
    from lungct_tune.training.trainer import Trainer

    epochs = epochs_of(run(slot, 0, SHALLOW))
    plan = slot.plan
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
    kept = np.load(slot.folder / "trials" / "0000" / "valid.npy")
    held_out = np.concatenate([fold.valid_rows for fold in plan.folds])
    assert sorted(held_out) == sorted(set(held_out))
    in_order = np.argsort(held_out)
    assert np.array_equal(kept, np.concatenate([probabilities_NC for _, probabilities_NC in by_epoch[-1]])[in_order])


@of_folds
@pytest.mark.long
def test_folds_of_a_lost_worker_go_on_from_their_last_epoch(slot: InActor) -> None:
    whole = epochs_of(run(slot, 1))
    begin(slot, 2)
    kill_a_worker()
    report = step(slot)
    assert report.outcome is Outcome.COMPLETED
    assert [*map(comparable, report.epochs)] == [*map(comparable, whole)]
