"""The final retraining: what its workers train on and predict, and that it continues as if it had not been stopped."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from processes import wait_for
from ray_state import nothing_held, train_workers

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import validate
from lungct_tune.data import read_images, split_images
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import StudyError
from lungct_tune.experiment.trial import TrialOrder
from lungct_tune.filesystem import StorageError
from lungct_tune.models.features import pooled_features
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.training.trainer import Trainer
from lungct_tune.tuning.final_slots import FinalSlots, RetrainingFailed
from lungct_tune.tuning.fold_model import Fold, FoldModel
from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.retrain import FEATURES, PREDICTIONS, STATE, WEIGHTS, RetrainOrder, read_result, retrain
from lungct_tune.tuning.shared_data import SharedDataset, share_dataset
from lungct_tune.tuning.slot_plan import SlotPlan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lungct_tune.data import ImageSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the workers: sums of floats depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(phantoms: Path) -> ImageSet:
    return read_images(phantoms, 32, progress=False)


def dataset(images: ImageSet, rows: np.ndarray) -> SharedDataset:
    return SharedDataset(
        images=images.images_NHW[rows],
        rows=rows,
        labels_N=images.table["label"].to_numpy()[rows],
        classes=len(images.classes),
        backbone=None,
        normalisation="unit",
        batch_size=8,
        epochs=4,
    )


def searched(images: ImageSet) -> SharedDataset:
    return dataset(images, np.flatnonzero(split_images(images, "grouped", seed=0) != "test"))


def slot_plan(images: ImageSet, storage: Path, mailbox: Any = None, interval: float = 1e9) -> SlotPlan:
    fold = Fold(searched(images).rows, searched(images).rows)
    experiment = Experiment.at(str(storage), "one")
    return SlotPlan(experiment, searched(images), (fold,), 1, {"CPU": 1}, mailbox, checkpoint_interval=interval)


@pytest.fixture
def mailbox(cluster: None) -> Iterator[Any]:
    with opened_mailbox("one") as mailbox:
        yield mailbox


def order(images: ImageSet) -> RetrainOrder:
    return RetrainOrder(
        number=3,
        hyperparameters=Hyperparameters(truncation_depth=3, augmentation=0.5, dropout=0.2),
        seed=3,
        test=dataset(images, np.flatnonzero(split_images(images, "grouped", seed=0) == "test")),
    )


def files(experiment: Experiment, one: RetrainOrder) -> dict[str, bytes]:
    found = {name: experiment.read(one.file(name)) for name in (STATE, WEIGHTS, PREDICTIONS, FEATURES)}
    return {name: content for name, content in found.items() if content is not None}


@pytest.fixture(scope="module")
def whole(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a retraining that nothing stopped."""
    plan = slot_plan(images, tmp_path_factory.mktemp("whole"))
    retrain(plan, order(images), CPU)
    return files(plan.experiment, order(images))


def test_predicts_the_test_images_with_the_weights_that_it_writes(images: ImageSet, whole: dict[str, bytes]) -> None:
    assert set(whole) == {WEIGHTS, PREDICTIONS, FEATURES}, "a retraining that ends before a state is due writes none"
    one, every = order(images), dataset(images, np.arange(len(images.table)))
    trainer = every.trainer(one.hyperparameters, every.rows, 0, CPU)
    model = trainer.average.model.eval()
    model.load_state_dict(safetensors.torch.load(whole[WEIGHTS]))
    grey_N1HW = as_grey(trainer.images_NHW[one.test.rows])
    with torch.inference_mode():
        expected_NC = forward(model, grey_N1HW, trainer.normalisation).softmax(dim=1).numpy()
    np.testing.assert_allclose(np.load(io.BytesIO(whole[PREDICTIONS])), expected_NC, atol=1e-6)
    with np.load(io.BytesIO(whole[FEATURES])) as kept:
        assert set(kept["rows"]) == set(searched(images).rows), "no test image"
        features_ND = pooled_features(model, torch.tensor(images.images_NHW), kept["rows"], "unit")
        np.testing.assert_allclose(kept["features"], features_ND, atol=1e-5)


def test_a_stopped_retraining_continues_to_the_same_weights(
    images: ImageSet, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, one, train_epoch = slot_plan(images, tmp_path, interval=0.0), order(images), Trainer.train_epoch

    def lost_in_the_third_epoch(trainer: Trainer) -> float:
        time.sleep(0.3)  # until the earlier epoch's state is written
        if trainer.epoch == 2:
            raise RuntimeError("worker lost")
        return train_epoch(trainer)

    with monkeypatch.context() as losing:
        losing.setattr(Trainer, "train_epoch", lost_in_the_third_epoch)
        with pytest.raises(RuntimeError, match="lost"):
            retrain(plan, one, CPU)
    assert set(files(plan.experiment, one)) == {STATE}
    trained: list[int] = []
    with monkeypatch.context() as counting:
        counting.setattr(Trainer, "train_epoch", lambda trainer: (trained.append(trainer.epoch), train_epoch(trainer)))
        retrain(plan, one, CPU)
    assert trained == [2, 3]
    again = files(plan.experiment, one)
    assert (again[WEIGHTS], again[PREDICTIONS]) == (whole[WEIGHTS], whole[PREDICTIONS])


def test_a_damaged_state_is_not_continued_from(images: ImageSet, whole: dict[str, bytes], tmp_path: Path) -> None:
    plan, one = slot_plan(images, tmp_path), order(images)
    plan.experiment.write(one.file(STATE), b"half a state")
    retrain(plan, one, CPU)
    assert files(plan.experiment, one)[WEIGHTS] == whole[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, PREDICTIONS, FEATURES])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_retraining_whose_files_a_lost_machine_has_damaged_counts_as_not_ended(
    name: str,
    share: float,
    images: ImageSet,
    whole: dict[str, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    experiment, one = Experiment.at(str(tmp_path), "one"), order(images)
    assert read_result(experiment, one) is None
    for each, content in whole.items():
        experiment.write(one.file(each), content)
    assert read_result(experiment, one) and not caplog.text
    experiment.write(one.file(name), whole[name][: int(len(whole[name]) * share)])
    assert read_result(experiment, one) is None
    assert f"runs again: its files in {tmp_path}/one/{one.folder} are damaged" in caplog.text


def test_a_member_of_an_ensemble_is_the_model_that_the_trial_had(images: ImageSet, tmp_path: Path) -> None:
    plan, one = slot_plan(images, tmp_path), replace(order(images), fold=1)
    experiment, data = plan.experiment, plan.dataset
    fold = Fold(np.delete(data.rows, np.s_[::3]), data.rows[::3])
    retrain(replace(plan, folds=(*plan.folds, fold)), one, CPU)
    trial = FoldModel(data, fold, TrialOrder(one.number, one.seed, one.hyperparameters), CPU, each_alone=True)
    for _ in range(data.epochs):
        trial.train_and_validate()
    written, expected = safetensors.torch.load(files(experiment, one)[WEIGHTS]), trial.trainer.model_state()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    with np.load(io.BytesIO(files(experiment, one)[FEATURES])) as kept:
        assert set(kept["rows"]) == set(fold.train_rows)
    assert not files(experiment, order(images)) and not files(experiment, replace(one, fold=0)), "each has its own"


def gated(one: RetrainOrder, gate: Path) -> RetrainOrder:
    """An order whose workers wait for a file before they predict test."""

    class Gated(SharedDataset):  # defined here, so that workers need not import this file
        def images_on(self, device: torch.device) -> torch.Tensor:
            while not gate.exists():
                time.sleep(0.1)
            return super().images_on(device)

    return replace(one, test=Gated(**vars(one.test)))


def test_slots_share_retrainings_the_first_starts_early_and_all_give_their_room_back(
    images: ImageSet, whole: dict[str, bytes], tmp_path: Path, mailbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two of the three slots. One trains a model, the other the rest at the same time."""
    monkeypatch.setattr("lungct_tune.tuning.slot_actor.RELEASE_S", 0.0)  # their workers do not end in time
    plan, one, near, gate = slot_plan(images, tmp_path, mailbox), order(images), False, tmp_path / "gate"
    orders = [gated(one, gate), *(replace(one, number=number) for number in (4, 5))]
    notes: list[dict[str, int]] = []

    def others_end_first() -> None:
        wait_for(lambda: all(plan.experiment.read(other.file(PREDICTIONS)) for other in orders[1:]), within_s=120)
        gate.touch()

    with FinalSlots(plan, 3, lambda: near) as slots:
        time.sleep(3)
        assert train_workers() == [], "the search still needs the room"
        near = True
        wait_for(train_workers, within_s=120)
        results, _ = slots.retrain(orders, [], others_end_first, lambda now: notes.append({**now}))
    assert [result.weights for result in results] == [whole[WEIGHTS]] * 3
    assert notes[0] == {each.folder: 0 for each in orders} and notes[-1] == {}
    assert nothing_held(besides=("Mailbox",))
    with FinalSlots(plan, 2, lambda: True) as idle:
        (read,), _ = idle.retrain([one])
        time.sleep(3)
        assert train_workers() == [], "there is nothing to retrain"
    assert np.array_equal(read.probabilities_NC, results[0].probabilities_NC) and nothing_held(besides=("Mailbox",))


@pytest.mark.long
def test_a_retraining_that_fails_ends_the_others(images: ImageSet, tmp_path: Path, mailbox: Any) -> None:
    class TooLarge(SharedDataset):
        def images_on(self, device: torch.device) -> torch.Tensor:
            raise MemoryError("test does not fit")

    plan, one = slot_plan(images, tmp_path, mailbox), order(images)
    waits, fails = gated(one, tmp_path / "gate"), replace(one, number=4, test=TooLarge(**vars(one.test)))
    with (
        FinalSlots(plan, 2, lambda: False) as slots,
        pytest.raises(RetrainingFailed, match=r"test does not fit[\s\S]*--resume continues"),
    ):
        slots.retrain([waits, fails])
    assert nothing_held(besides=("Mailbox",))


@pytest.mark.long
def test_a_retraining_that_diverges_costs_only_the_comparison_or_is_told_with_what_helps(
    images: ImageSet, tmp_path: Path, mailbox: Any
) -> None:
    import ray

    plan, one = slot_plan(images, tmp_path, mailbox), order(images)
    diverging = replace(one, number=4, hyperparameters=replace(one.hyperparameters, backbone_lr=1e18, head_lr=1e18))
    with FinalSlots(plan, 2, lambda: False) as slots:
        ours, theirs = slots.retrain([one], [diverging])
    assert len(ours) == 1 and theirs == []
    (said,) = ray.get(mailbox.exchange.remote(set()))
    assert said.startswith("the retraining of trial 4 has diverged: loss ")
    with (
        FinalSlots(plan, 1, lambda: False) as slots,
        pytest.raises(RetrainingFailed, match=r"the retraining of trial 4 has diverged[\s\S]*with more trials"),
    ):
        slots.retrain([one, diverging])


@pytest.mark.long
def test_a_slot_that_started_early_gives_its_room_back_to_a_search_that_waits_for_it(
    images: ImageSet, tmp_path: Path, mailbox: Any
) -> None:
    """Also if the workers of the search's slots have another shape. The search and the retraining waited for ever."""
    import ray

    with FinalSlots(slot_plan(images, tmp_path, mailbox), 1, lambda: True):
        wait_for(train_workers, within_s=120)
        everything = {"CPU": ray.cluster_resources()["CPU"]}
        group = ray.util.placement_group([everything], name="one-slot-1-a")
        assert group.wait(60)
        ray.util.remove_placement_group(group)


def test_no_retraining_starts_on_a_node_that_the_search_leaves_alone(
    images: ImageSet, tmp_path: Path, mailbox: Any
) -> None:
    import ray

    ray.get(mailbox.avoid.remote({node["NodeID"] for node in ray.nodes()}))
    with FinalSlots(slot_plan(images, tmp_path, mailbox), 1, lambda: True) as slots:
        time.sleep(3)
        assert not train_workers() and not slots._has_room()


@pytest.mark.long
def test_a_slot_that_started_early_gives_its_room_back_when_the_study_does_not_answer(
    images: ImageSet, tmp_path: Path, mailbox: Any
) -> None:
    """Its thread ended, and kept the room for which the search may wait."""
    import ray

    warnings: list[str] = []

    def nears_end() -> bool:
        if train_workers():
            raise StudyError("the database is locked")
        return True

    def is_told() -> bool:
        warnings.extend(ray.get(mailbox.exchange.remote(set())))
        return bool(warnings) and not train_workers()

    with FinalSlots(slot_plan(images, tmp_path, mailbox), 1, nears_end):
        wait_for(is_told, within_s=120)
        assert "the database is locked" in warnings[0]


def test_slots_cannot_read_test_images_and_what_does_not_fit_is_refused_when_it_is_shared(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    settings = validate({"epochs": 4, "batch_size": 8})
    split = split_images(images, "grouped", seed=0)
    rows, test = np.flatnonzero(split != "test"), np.flatnonzero(split == "test")
    of_slots = share_dataset(settings, images, rows, None)
    with pytest.raises(ValueError, match="not shared"):
        of_slots.positions(test[:1])
    assert len(of_slots.images_on(CPU)) == len(rows)
    room = len(rows) * images.images_NHW[0].nbytes
    monkeypatch.setattr("lungct_tune.tuning.shared_data.object_store_room", lambda: room)
    share_dataset(settings, images, test, None)  # alone they would fit
    with pytest.raises(StorageError, match="images need"):
        share_dataset(settings, images, test, None, besides=of_slots)
