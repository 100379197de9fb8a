"""A trial on its workers: steps, states, its files. Without Ray."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file
from trials import SHALLOW, comparable, epochs_of, order, run_all, runner, slot_plan

from lungct_tune.experiment.folder import delete_states, old_state_file
from lungct_tune.experiment.trial import EpochFigures, Outcome
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning import trial_runner
from lungct_tune.tuning.fold_model import FoldModel
from lungct_tune.tuning.retrain import STATE, RetrainOrder, retrain
from lungct_tune.tuning.trial_runner import TrialRunner
from lungct_tune.tuning.trial_state import to_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lungct_tune.tuning.slot_plan import SlotPlan

EPOCHS = 4


@pytest.fixture
def plan(tmp_path: Path, phantoms: Path) -> SlotPlan:
    return slot_plan(tmp_path, phantoms, epochs=EPOCHS)


@pytest.fixture(autouse=True)
def steps_end_at_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is."""
    monkeypatch.setattr(trial_runner, "STEP_S", float("inf"))


def states(plan: SlotPlan, number: int) -> list[str]:
    folder = Path(plan.experiment.uri, "trials", f"{number:04d}")
    return sorted(path.name for path in folder.glob("*.pt"))


def run_to(trial: TrialRunner, epoch: int) -> TrialRunner:
    """The trial after so many epochs, with its states written."""
    while len(trial._history) < epoch:
        trial.run()
    trial._writer.wait()
    return trial


def test_a_step_goes_to_the_next_rung_or_to_the_end_and_reports_all_epochs(plan: SlotPlan) -> None:
    trial = runner(plan, order(0), rungs=(1, 3))
    first, second, last = run_all(trial)
    assert [[figures.epoch for figures in report.epochs] for report in (first, second, last)] == [[1], [2, 3], [4]]
    assert first.outcome is second.outcome is Outcome.RUNNING and last.outcome is Outcome.COMPLETED
    assert {figures.slot for figures in epochs_of([first, second, last])} == {2}
    assert all(report.cost and report.cost.images == trial._images for report in (first, second, last))


def test_the_next_step_is_known_but_at_rungs_at_the_end_and_where_steps_take_long(
    plan: SlotPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_runner, "STEP_S", 0.0)
    trial, goes_on = runner(plan, order(0), rungs=(2,)), list[bool]()
    while not trial.run().is_last:
        goes_on.append(trial.goes_on)
    assert [*goes_on, trial.goes_on] == [True, False, True, False]
    monkeypatch.setattr(trial_runner, "AHEAD_S", 0.0)
    slow = runner(plan, order(1), rungs=(2,))
    assert not slow.run().is_last and not slow.goes_on


def test_a_trial_that_diverges_reports_the_epochs_before_it(plan: SlotPlan) -> None:
    trial = runner(plan, order(0), rungs=(), checkpoint_interval=3600)

    def break_after_two_epochs() -> bool:
        if trial._models[0].trainer.epoch == 2:
            next(trial._models[0].trainer.model.head.parameters()).data.fill_(float("nan"))
        return False

    report = trial.run(must_save=break_after_two_epochs)
    assert report.outcome is Outcome.DIVERGED and "epoch 3" in report.reason
    assert [figures.epoch for figures in report.epochs] == [figures.epoch for figures in report.trained] == [1, 2]


def test_a_resumed_trial_says_which_epochs_it_has_trained(plan: SlotPlan) -> None:
    run_to(runner(plan, order(0)), 2)
    report = runner(plan, order(0)).run()
    assert [len(report.epochs), len(report.trained)] == [3, 1]


def test_states_of_version_0_1_are_a_file_for_each_fold_and_count_if_all_are_of_the_same_epoch(
    tmp_path: Path, phantoms: Path
) -> None:
    plan = slot_plan(tmp_path, phantoms, epochs=EPOCHS, folds=2)
    trial = run_to(runner(plan, order(0)), 2)
    history = [replace(figures, balanced_accuracy_sd=None).as_dict() for figures in trial._history]
    delete_states(plan.experiment, 0)

    def write(fold: int, epochs: int) -> None:
        training = trial._models[fold].trainer.state_dict()
        state = {"order": trial.order.identity, "training": training, "history": history[:epochs]}
        plan.experiment.write(old_state_file(0, fold), to_bytes(state))

    write(0, 2)
    write(1, 1)
    assert runner(plan, order(0))._history == []
    write(1, 2)
    resumed, whole = runner(plan, order(0)), run_all(runner(plan, order(1)))
    assert len(resumed._history) == 2
    assert [*map(comparable, epochs_of(run_all(resumed)))][2:] == [*map(comparable, epochs_of(whole))][2:]


def test_a_state_that_cannot_be_made_is_reported(plan: SlotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(state: object) -> bytes:
        raise MemoryError("out of memory")

    monkeypatch.setattr("lungct_tune.tuning.trial_state.to_bytes", too_large)
    warnings: list[str] = []
    trial = runner(plan, order(0), warn=warnings.append)
    for _ in range(2):
        trial.run()
        trial._writer.wait()
    assert warnings and "its state is not saved: out of memory" in warnings[0]


def test_a_step_ends_with_the_first_epoch_after_its_time(plan: SlotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_runner, "STEP_S", 0.0)
    assert [len(report.epochs) for report in run_all(runner(plan, order(0), rungs=()))] == [1] * EPOCHS


def test_a_trial_goes_on_from_its_newest_state_as_if_it_had_never_stopped(plan: SlotPlan) -> None:
    whole = epochs_of(run_all(runner(plan, order(0))))
    run_to(runner(plan, order(1)), 2)
    assert states(plan, 1)[-1] == "state-0002.pt"
    again = runner(plan, order(1))
    first = again.run()
    assert [figures.epoch for figures in first.epochs] == [1, 2, 3]  # the study may not know the first two
    assert [*map(comparable, epochs_of([first, *run_all(again)]))] == [*map(comparable, whole)]
    folders = [Path(plan.experiment.uri, "trials", number) for number in ("0000", "0001")]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert np.array_equal(*[np.load(folder / "valid.npy") for folder in folders])


def test_only_the_figures_at_rungs_and_at_the_end_are_of_norms_from_many_images(
    plan: SlotPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, train_and_validate = list[bool](), FoldModel.train_and_validate

    def noted(self: FoldModel, *, rough: bool) -> EpochFigures:
        asked.append(rough)
        return train_and_validate(self, rough=rough)

    monkeypatch.setattr(FoldModel, "train_and_validate", noted)
    run_all(runner(plan, order(0), rungs=(2,)))
    assert asked == [True, False, True, False]


def test_a_trial_is_judged_and_kept_as_it_is_after_its_last_epoch(plan: SlotPlan) -> None:
    """Found in the default search: one lucky epoch, 9 of 18, decided the winner and how long it was retrained."""
    trial = runner(plan, order(0))
    last = epochs_of(run_all(trial))[-1]
    with safe_open(Path(plan.experiment.uri, "trials", "0000", "model.safetensors"), "pt") as file:
        assert int(file.metadata()["epoch"]) == last.epoch == EPOCHS
        assert float(file.metadata()["balanced_accuracy"]) == last.balanced_accuracy
    kept_NC = np.load(Path(plan.experiment.uri, "trials", "0000", "valid.npy"))
    assert np.array_equal(kept_NC, trial._models[0].trainer.probabilities(trial._models[0]._valid_positions))


def test_a_trial_whose_completion_nobody_heard_of_completes_again(plan: SlotPlan) -> None:
    """The driver died after its files were written."""
    first = run_all(runner(plan, order(0)))
    folder = Path(plan.experiment.uri, "trials", "0000")
    weights, valid_NC = load_file(folder / "model.safetensors"), np.load(folder / "valid.npy")
    assert states(plan, 0)[-1] == f"state-{EPOCHS - 1:04d}.pt"
    again = run_all(runner(plan, order(0)))
    assert [*map(comparable, epochs_of(again))] == [*map(comparable, epochs_of(first))]
    assert np.array_equal(np.load(folder / "valid.npy"), valid_NC)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in load_file(folder / "model.safetensors").items())


def test_a_state_is_written_when_it_is_due_and_older_ones_go(plan: SlotPlan) -> None:
    trial = runner(plan, order(0), rungs=(), checkpoint_interval=3600)
    run_all(trial)
    assert states(plan, 0) == []  # a trial that ends before its first state is due has none
    run_to(runner(plan, order(1)), 3)
    assert states(plan, 1) == ["state-0002.pt", "state-0003.pt"]
    delete_states(plan.experiment, 1)
    assert states(plan, 1) == []


def test_a_worker_that_may_be_lost_saves_at_once(plan: SlotPlan) -> None:
    trial = runner(plan, order(0), checkpoint_interval=3600)
    trial.run(must_save=lambda: True)
    trial._writer.wait()
    assert states(plan, 0) == ["state-0001.pt"]


def test_a_trial_that_is_interrupted_saves_its_state_and_one_that_may_have_ended_does_not(
    plan: SlotPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_runner, "STEP_S", 0.0)
    for number, rungs in enumerate([(), (1,)]):
        trial = runner(plan, order(number), rungs=rungs, checkpoint_interval=3600)
        trial.run()
        trial.close()
    ended = runner(plan, order(2), rungs=(), checkpoint_interval=3600)
    run_all(ended)
    ended.close()
    assert [states(plan, number) for number in range(3)] == [["state-0001.pt"], [], []]


def test_a_state_of_another_study_is_not_taken_for_the_trials_own(plan: SlotPlan) -> None:
    run_to(runner(plan, order(0)), 2)
    other = order(0, replace(SHALLOW, backbone_lr=2e-3))
    assert [figures.epoch for figures in runner(plan, other).run().epochs] == [1]


def test_a_trial_goes_on_from_a_state_that_is_larger_than_other_files_may_be(
    plan: SlotPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of five folds, trained by one worker, has a state of up to 2 GB."""
    run_to(runner(plan, order(0)), 2)
    monkeypatch.setattr("lungct_tune.experiment.folder.MOST_BYTES", 1000)
    assert len(runner(plan, order(0))._history) == 2


def test_a_damaged_state_costs_the_epochs_since_the_one_before(plan: SlotPlan) -> None:
    whole = epochs_of(run_all(runner(plan, order(0))))
    run_to(runner(plan, order(1)), 3)
    newest = Path(plan.experiment.uri, "trials", "0001", "state-0003.pt")
    newest.write_bytes(newest.read_bytes()[:-1000])
    again = runner(plan, order(1))
    assert len(again._history) == 2
    assert [*map(comparable, epochs_of(run_all(again)))] == [*map(comparable, whole)]


def test_training_goes_on_while_the_storage_refuses_states(plan: SlotPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    refused = 0
    write = type(plan.experiment).write

    def refuse(self: object, path: str, content: bytes) -> None:
        nonlocal refused
        if refused < 4:  # states, and then the first tries to write the trial's files
            refused += 1
            raise StorageError("s3://bucket: cannot write: no server answers")
        write(plan.experiment, path, content)

    monkeypatch.setattr(type(plan.experiment), "write", refuse)
    monkeypatch.setattr(trial_runner, "PAUSE_S", 0.0)
    trial = runner(plan, order(0), warn=warnings.append)
    reports = []
    for _ in range(EPOCHS):
        reports.append(trial.run())
        trial._writer.wait()
    assert reports[-1].outcome is Outcome.COMPLETED and refused == 4
    assert "its state is not saved: s3://bucket" in warnings[0] and "waits for the storage" in warnings[-1]
    assert Path(plan.experiment.uri, "trials", "0000", "valid.npy").exists()


def test_only_a_trial_that_ranks_among_the_best_keeps_its_files(plan: SlotPlan) -> None:
    run_all(runner(plan, replace(order(0), weights_from=(0.0, -100.0))))
    run_all(runner(plan, replace(order(1), weights_from=(2.0, 0.0))))
    kept = [Path(plan.experiment.uri, "trials", number, "model.safetensors") for number in ("0000", "0001")]
    assert [file.exists() for file in kept] == [True, False]


@pytest.fixture
def free_memory() -> Iterator[Callable[[], None]]:
    """What a worker does between two trials."""
    from lungct_tune.tuning.workers import _free_memory

    yield _free_memory
    gc.unfreeze()  # this process has other things to collect


def test_a_state_that_is_still_being_written_when_its_trial_has_ended_stays_nowhere(
    plan: SlotPlan, monkeypatch: pytest.MonkeyPatch, free_memory: Callable[[], None]
) -> None:
    may_write, write = threading.Event(), type(plan.experiment).write

    def slow(self: object, path: str, content: bytes) -> None:
        may_write.wait(60)
        write(plan.experiment, path, content)

    monkeypatch.setattr(type(plan.experiment), "write", slow)
    trial = runner(plan, order(0), rungs=(1,), checkpoint_interval=0)
    trial.run()
    writer, left = trial._writer, weakref.ref(trial._models[0].trainer)
    assert not writer.is_idle
    trial.drop()
    del trial
    free_memory()
    assert left() is None
    delete_states(plan.experiment, 0)  # as the driver does when it hears of the end
    may_write.set()
    writer.wait()
    assert states(plan, 0) == [], "and stays nowhere, because the trial has ended"


def test_the_model_of_an_ended_trial_does_not_stay_in_memory(plan: SlotPlan, free_memory: Callable[[], None]) -> None:
    trial: TrialRunner | None = runner(plan, order(0))
    assert trial is not None
    model = weakref.ref(trial._models[0].trainer.model.backbone)
    trial = None
    free_memory()
    assert model() is None


def _two_ranks(rank: int, folder: Path, phantoms: Path, folds: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{folds}", rank=rank, world_size=2)
    try:
        plan = slot_plan(folder, phantoms, epochs=EPOCHS, folds=folds, workers=2)
        whole = epochs_of(run_all(runner(plan, order(0))))
        run_to(runner(plan, order(1)), 2)
        dist.barrier()
        if folds == 1 and rank == 1:  # this rank's read of the storage would find nothing
            plan = slot_plan(folder / "elsewhere", phantoms, epochs=EPOCHS, workers=2)
        if folds > 1 and rank == 0:  # the workers were lost when only one of them had written its newest state
            Path(plan.experiment.uri, "trials", "0001", "state-0002.pt").unlink()
        dist.barrier()
        again = runner(plan, order(1))
        assert len(again._history) == (2 if folds == 1 else 1)
        resumed = epochs_of(run_all(again))
        assert [*map(comparable, resumed)] == [*map(comparable, whole)]
        if folds == 1:
            weights = torch.cat([value.flatten().double() for value in again._models[0].trainer.model_state().values()])
            others = [torch.empty_like(weights) for _ in range(2)]
            dist.all_gather(others, weights)
            assert torch.equal(*others)
            apart = runner(plan, order(2))
            apart._models[0].trainer.epoch = rank
            with pytest.raises(RuntimeError, match="workers are at different epochs"):
                apart.run()
            retraining = RetrainOrder(1, order(2).hyperparameters, 0, plan.dataset)
            retrain(
                replace(plan, checkpoint_interval=1e9), retraining, torch.device("cpu"), must_save=lambda: rank == 1
            )
            assert rank == 1 or plan.experiment.exists(retraining.file(STATE)), "the second worker may be lost"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("folds", [1, 3])
def test_workers_continue_from_the_same_epoch_whatever_each_finds_on_the_storage(
    tmp_path: Path, phantoms: Path, folds: int
) -> None:
    mp.spawn(_two_ranks, args=(tmp_path, phantoms, folds), nprocs=2)
