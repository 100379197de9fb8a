"""The final retraining: what its workers train on and predict, and that it continues as if it had not been stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import safetensors.torch
import torch

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import validate
from lungct_tune.data import read_images, split_images
from lungct_tune.experiment.folder import Experiment
from lungct_tune.filesystem import StorageError
from lungct_tune.training.trainer import Trainer
from lungct_tune.tuning.retrain import PREDICTIONS, STATE, WEIGHTS, RetrainPlan, retrain, retrain_and_predict
from lungct_tune.tuning.shared_data import SharedDataset, share_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from lungct_tune.data import ImageSet

CPU = torch.device("cpu")


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


def plan(images: ImageSet, storage: Path, interval: float = 1e9) -> RetrainPlan:
    split = split_images(images, "grouped", seed=0)
    return RetrainPlan(
        experiment=Experiment.at(str(storage), "one"),
        name="trial_0003_004_epochs",
        dataset=dataset(images, np.flatnonzero(split != "test")),
        test=dataset(images, np.flatnonzero(split == "test")),
        hyperparameters=Hyperparameters(truncation_depth=3, augmentation=0.5, dropout=0.2),
        seed=3,
        checkpoint_interval=interval,
        workers=1,
        resources_per_worker={"CPU": 1},
    )


def files(one: RetrainPlan) -> dict[str, bytes]:
    found = {name: one.experiment.read(one.file(name)) for name in (STATE, WEIGHTS, PREDICTIONS)}
    return {name: content for name, content in found.items() if content is not None}


def test_predicts_the_test_images_with_the_weights_that_it_writes(images: ImageSet, tmp_path: Path) -> None:
    one = plan(images, tmp_path)
    retrain(one, CPU)
    assert set(files(one)) == {WEIGHTS, PREDICTIONS}, "a retraining that ends before a state is due writes none"
    result = retrain_and_predict(one)  # what has ended is read, and needs no Ray
    trainer = one.dataset.trainer(one.hyperparameters, one.dataset.rows, 0, CPU)
    trainer.model.load_state_dict(safetensors.torch.load(result.weights))
    of_all = dataset(images, np.arange(len(images.table)))
    again = of_all.trainer(one.hyperparameters, one.dataset.rows, 0, CPU)
    again.model.load_state_dict(trainer.model.state_dict())
    np.testing.assert_allclose(result.probabilities_NC, again.probabilities(one.test.rows), atol=1e-6)


def test_a_stopped_retraining_continues_to_the_same_weights(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = plan(images, tmp_path / "whole"), plan(images, tmp_path / "stopped", interval=0.0)
    retrain(whole, CPU)
    train_epoch = Trainer.train_epoch

    def lost_in_the_third_epoch(trainer: Trainer) -> float:
        if trainer.epoch == 2:
            raise RuntimeError("worker lost")
        return train_epoch(trainer)

    with monkeypatch.context() as losing:
        losing.setattr(Trainer, "train_epoch", lost_in_the_third_epoch)
        with pytest.raises(RuntimeError, match="lost"):
            retrain(stopped, CPU)
    assert set(files(stopped)) == {STATE}
    trained: list[int] = []
    with monkeypatch.context() as counting:
        counting.setattr(Trainer, "train_epoch", lambda trainer: (trained.append(trainer.epoch), train_epoch(trainer)))
        retrain(stopped, CPU)
    assert trained == [2, 3]
    assert files(stopped)[WEIGHTS] == files(whole)[WEIGHTS]
    assert files(stopped)[PREDICTIONS] == files(whole)[PREDICTIONS]


def test_a_damaged_state_is_not_continued_from(images: ImageSet, tmp_path: Path) -> None:
    whole, damaged = plan(images, tmp_path / "whole"), plan(images, tmp_path / "damaged")
    retrain(whole, CPU)
    damaged.experiment.write(damaged.file(STATE), b"half a state")
    retrain(damaged, CPU)
    assert files(damaged)[WEIGHTS] == files(whole)[WEIGHTS]


def test_slots_cannot_read_test_images_and_what_does_not_fit_is_refused_when_it_is_shared(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    settings = validate({"epochs": 4, "batch_size": 8})
    split = split_images(images, "grouped", seed=0)
    searched, test = np.flatnonzero(split != "test"), np.flatnonzero(split == "test")
    of_slots = share_dataset(settings, images, searched, None)
    with pytest.raises(ValueError, match="not shared"):
        of_slots.positions(test[:1])
    assert len(of_slots.images_on(CPU)) == len(searched)
    room = len(searched) * images.images_NHW[0].nbytes
    monkeypatch.setattr("lungct_tune.tuning.shared_data.object_store_room", lambda: room)
    share_dataset(settings, images, test, None)  # alone they would fit
    with pytest.raises(StorageError, match="images need"):
        share_dataset(settings, images, test, None, besides=of_slots)
