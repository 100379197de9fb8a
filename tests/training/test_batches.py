"""Batches of images that do not fit the device are gathered ahead, in order, and all of them."""

from __future__ import annotations

import threading

import pytest
import torch
from toys import toy_data, training

from lungct_tune.training import batches
from lungct_tune.training.batches import AHEAD, gathered_ahead, on_device


def test_gathered_batches_are_those_that_were_asked_for() -> None:
    images_NHW, _ = toy_data()
    order = torch.randperm(len(images_NHW)).split(7)  # the last is smaller
    gathered = list(gathered_ahead(images_NHW, order, pinned=False))
    assert len(gathered) == len(order)
    for images_nHW, indices_n in zip(gathered, order, strict=True):
        assert torch.equal(images_nHW, images_NHW[indices_n])


def test_a_thread_gathers_ahead_but_not_everything() -> None:
    images_NHW, _ = toy_data()
    asked = []

    def batches_of_4() -> object:
        for indices_n in torch.arange(48).split(4):
            asked.append(indices_n)
            yield indices_n

    gathering = gathered_ahead(images_NHW, batches_of_4(), pinned=False)
    next(gathering)
    assert len(asked) == AHEAD + 1
    gathering.close()  # as when a step fails
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_an_error_in_the_thread_is_raised_where_the_batch_is_used() -> None:
    with pytest.raises(IndexError):
        list(gathered_ahead(toy_data()[0], [torch.tensor([48])], pinned=False))


def test_images_on_the_device_are_not_copied_through_the_cpu() -> None:
    images_NHW, _ = toy_data()
    (images_nHW,) = on_device(images_NHW, [torch.tensor([3, 1])], torch.device("cpu"))
    assert torch.equal(images_nHW, images_NHW[[3, 1]])


def test_a_training_on_gathered_batches_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = training(epochs=1)
    loss, probabilities_NC = expected.train_epoch(), expected.probabilities(range(40, 48))
    monkeypatch.setattr(
        "lungct_tune.training.trainer.on_device",
        lambda images_NHW, indices, device: batches.gathered_ahead(images_NHW, indices, pinned=False),
    )
    gathered = training(epochs=1)
    assert gathered.train_epoch() == loss
    assert (gathered.probabilities(range(40, 48)) == probabilities_NC).all()
