"""What a network costs, and where it looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lungct_tune.models.complexity import model_profile
from lungct_tune.models.gradcam import evidence_scale, grad_cam
from lungct_tune.models.truncated_resnet import TruncatedResNet50


def test_parameters_and_arithmetic_are_counted_as_they_are() -> None:
    whole = model_profile(49, 4, 224)
    model = TruncatedResNet50(49)
    assert sum(whole.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    head = whole.flops.pop("head")
    assert sum(whole.flops.values()) == pytest.approx(2 * 4.087e9, rel=0.01)  # ResNet50 has 4.09 billion multiply-adds
    assert head == 2 * (2048 * 256 + 256 * 128 + 128 * 4)
    assert "layer3" not in model_profile(20, 4, 224).flops


def test_maps_that_fail_leave_no_hook_behind() -> None:
    model = TruncatedResNet50(2)
    with pytest.raises(KeyError):
        grad_cam(model, np.zeros((1, 32, 32), np.uint8), np.zeros((1, 1), int), "no such normalisation", 1.0)
    assert not model.head.get_submodule("pool")._forward_pre_hooks


def test_maps_are_grad_cam_by_its_definition() -> None:
    torch.manual_seed(0)
    model = TruncatedResNet50(8, classes=3).eval()
    images_NHW = np.random.default_rng(0).integers(0, 255, (3, 32, 32), dtype=np.uint8)
    classes_N = np.array([2, 0, 1])
    classes_N2 = np.stack([classes_N, 2 - classes_N], axis=1)
    scale = evidence_scale(model, images_NHW, classes_N, "unit")
    maps_NKhw, probabilities_NC = grad_cam(model, images_NHW, classes_N2, "unit", scale)
    other_N1hw, _ = grad_cam(model, images_NHW, 2 - classes_N[:, None], "unit", scale)
    grey_N1HW = torch.from_numpy(images_NHW).unsqueeze(1) / 255
    features = model.backbone(grey_N1HW.repeat(1, 3, 1, 1)).detach().requires_grad_()
    logits_NC = model.head(features)
    logits_NC[range(3), classes_N].sum().backward()
    assert features.grad is not None
    weights = features.grad.mean(dim=(2, 3), keepdim=True)
    expected = (weights * features).sum(dim=1).relu().detach().numpy()
    expected /= expected.max()
    np.testing.assert_allclose(maps_NKhw[:, 0], expected, atol=1e-4)
    np.testing.assert_allclose(maps_NKhw[:, 1:], other_N1hw, atol=1e-5)
    np.testing.assert_allclose(probabilities_NC, logits_NC.softmax(dim=1).detach().numpy(), atol=1e-4)
