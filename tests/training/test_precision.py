"""What GPUs compute in, tried on a CPU, which has the same formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toys import SMALL, assert_same, compute_in, toy_data, training

from lungct_tune.models import preprocessing
from lungct_tune.models.preprocessing import as_grey, forward, precision_for, training_precision_for
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.trainer import NotFiniteLoss


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without bfloat16."""
    compute_in(torch.float16, monkeypatch)


def test_a_cpu_computes_in_float32_without_a_scaler() -> None:
    assert precision_for(torch.device("cpu")) == torch.float32
    assert not training().scaler.is_enabled() and training().state_dict()["scaler"] == {}


@pytest.mark.parametrize(
    ("able", "precision"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512_f", torch.float32)],
)
def test_a_cpu_trains_in_bfloat16_where_it_computes_in_it(
    able: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert training_precision_for(torch.device("cpu")) == precision
    trained = training(epochs=2)
    seen: list[Any] = []
    trained.model.backbone.conv1.register_forward_hook(
        lambda module, given, out: seen.append((module.training, out.dtype))
    )
    trained.train_epoch()
    assert set(seen) == {(True, precision)}
    trained.average.model.backbone.conv1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    trained.probabilities(range(8))
    assert seen[-1] == torch.float32  # the model that predicts


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_logits_are_float32_and_seldom_equal(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With logits of eight significant bits, some 20 of these images would have two equal ones."""
    torch.manual_seed(0)
    model = TruncatedResNet50(5).eval()
    grey_N1HW = as_grey(toy_data(400)[0])
    with torch.inference_mode():
        exact_NC = forward(model, grey_N1HW, "unit")
        monkeypatch.setattr(preprocessing, "precision_for", lambda device: precision)
        logits_NC = forward(model, grey_N1HW, "unit")
    assert logits_NC.dtype == torch.float32
    assert all(len(logits_C.unique()) == 4 for logits_C in logits_NC)
    assert not torch.equal(logits_NC, exact_NC)  # it was the lower precision
    torch.testing.assert_close(logits_NC, exact_NC, rtol=0.05, atol=0.01)


@pytest.mark.usefixtures("float16")
def test_float16_learns_with_a_scaler() -> None:
    easy = training(replace(SMALL, augmentation=0.1))
    losses = [easy.train_epoch() for _ in range(4)]
    assert easy.scaler.is_enabled() and losses[-1] < 0.8 * losses[0]
    assert np.isfinite(easy.probabilities(range(40, 48))).all()


@pytest.mark.usefixtures("float16")
def test_a_step_that_the_scaler_skips_is_not_a_divergence() -> None:
    skipping = training(epochs=1)
    skipping.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # so large that every gradient overflows
    before = {name: parameter.clone() for name, parameter in skipping.model.named_parameters()}
    assert np.isfinite(skipping.train_epoch()) and skipping.epoch == 1
    assert skipping.scaler.get_scale() == 2.0 ** (40 - skipping.steps)
    assert_same(dict(skipping.model.named_parameters()), before)


@pytest.mark.usefixtures("float16")
def test_gradients_that_overflow_at_any_scale_are_a_divergence() -> None:
    diverging = training()
    diverging.scaler = torch.amp.GradScaler("cpu", init_scale=1e-3)
    diverging.model.head.logits.weight.data *= 1e9
    with pytest.raises(NotFiniteLoss, match="gradient norm inf in epoch 1, step 1"):
        diverging.train_epoch()
    lost = training(replace(SMALL, head_lr=1e38))
    with pytest.raises(NotFiniteLoss, match="loss nan"):
        lost.train_epoch()


@pytest.mark.usefixtures("float16")
def test_the_scale_is_part_of_the_state() -> None:
    through = training(epochs=2)
    through.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    through.train_epoch()
    state = through.state_dict()
    assert 2.0**16 < state["scaler"]["scale"] < 2.0**30
    resumed = training(epochs=2)
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == state["scaler"]["scale"]


def test_a_state_goes_on_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spot node of one kind is lost, and the next is of another."""
    float32 = training(epochs=2)
    float32.train_epoch()
    compute_in(torch.float16, monkeypatch)
    float16 = training(epochs=2)
    float16.load_state_dict(float32.state_dict())
    assert float16.train_epoch() > 0
    monkeypatch.undo()
    back = training(epochs=2)
    back.load_state_dict(float16.state_dict())
    assert back.epoch == 2 and not back.scaler.is_enabled()
