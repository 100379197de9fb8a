"""What predicts are averaged weights, with batch-norm statistics of their own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from toys import toy_data, training

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.objective import OBJECTIVE, validation_figures
from lungct_tune.training.weight_average import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def test_the_average_is_a_mean_at_first_and_exponential_after_its_horizon() -> None:
    model = TruncatedResNet50(1)
    average = WeightAverage(copy.deepcopy(model), model, horizon=4)
    values = [3.0, 5.0, 10.0, 2.0, 6.0, 0.0]
    expected = np.mean(values[:4])
    for step, value in enumerate(values):
        model.backbone.conv1.weight.data.fill_(value)
        average.begin_step(step)
        average.update()
        if step >= 4:
            expected += (value - expected) / 4
    assert average.model.backbone.conv1.weight.unique().item() == pytest.approx(expected)


def test_frozen_layers_are_not_averaged_and_keep_their_statistics() -> None:
    frozen = training(Hyperparameters(truncation_depth=4, frozen_share=0.25))
    before = copy.deepcopy(frozen.average.model.backbone.bn1.state_dict())
    frozen.train_epoch()
    frozen.probabilities([0])
    after = frozen.average.model.backbone.bn1.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_statistics_are_those_of_the_training_images_under_the_averaged_weights() -> None:
    trained = training(Hyperparameters(truncation_depth=1), batch_size=8)
    trained.train_epoch()
    trained.probabilities([0])
    model = trained.average.model
    images_NHW, _ = toy_data()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    channels_NCHW = (as_grey(images_NHW[:40]) - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        before_norm = model.backbone.conv1(channels_NCHW)
    torch.testing.assert_close(model.backbone.bn1.running_mean, before_norm.mean(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3)


def test_statistics_of_figures_that_decide_nothing_are_of_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.training.trainer.IMAGES_FOR_NORMS", (8, 16, 40))
    trained, batches = training(Hyperparameters(truncation_depth=1), batch_size=8, epochs=2), list[int]()
    estimate = trained.average.estimate_norms

    def counted(images: Iterable[Tensor], normalisation: str) -> None:
        images = list(images)
        batches.append(len(images))
        estimate(images, normalisation)

    monkeypatch.setattr(trained.average, "estimate_norms", counted)
    trained.train_epoch()
    for rough in (True, True, False, True):  # what is known from more images is not estimated from fewer
        trained.probabilities([0], rough=rough)
    trained.model_state()
    assert batches == [1, 2]
    trained.train_epoch()
    trained.probabilities([0], rough=True)
    assert batches == [1, 2, 5], "the last epoch decides"


def test_validation_sees_after_the_first_epoch_what_running_statistics_hide() -> None:
    """Found in the default search: all eight trials stood at exactly 0.25 at the first rung."""
    trained = training(Hyperparameters(truncation_depth=10, augmentation=0.0, head_lr=1e-2), epochs=8)
    for _ in range(2):
        trained.train_epoch()
    images_NHW, labels_N = toy_data()
    probabilities_NC = trained.probabilities(range(48))
    with torch.inference_mode():
        lagging_NC = forward(trained.model.eval(), as_grey(images_NHW), "imagenet").softmax(dim=1).numpy()
    figures, lagging = (validation_figures(labels_N.numpy(), p_NC) for p_NC in (probabilities_NC, lagging_NC))
    assert figures[OBJECTIVE] > lagging[OBJECTIVE] + 0.1
