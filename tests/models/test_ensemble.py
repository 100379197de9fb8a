"""Several networks as one: what it predicts, what it is made of, where it looks."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
from toys import model_config

from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.inference import build_model
from lungct_tune.experiment.bundle import BundleError
from lungct_tune.models.ensemble import Ensemble, joined_states
from lungct_tune.models.features import feature_channels, pooled_features
from lungct_tune.models.gradcam import evidence_scale, grad_cam
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50

TEMPERATURE = 1.7
IMAGES_NHW = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)


def network(seed: int) -> TruncatedResNet50:
    torch.manual_seed(seed)
    model = TruncatedResNet50(6, classes=3)
    for _ in range(3):
        forward(model, torch.rand(8, 1, 32, 32), "unit")  # statistics that are not those of the start
    model.head.get_submodule("logits").weight.data *= 20  # so that members disagree
    return model.eval()


MEMBERS = [network(seed) for seed in range(3)]


@torch.no_grad()
def probabilities(model: torch.nn.Module) -> np.ndarray:
    return forward(model, as_grey(torch.from_numpy(IMAGES_NHW)), "unit").softmax(dim=1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, TEMPERATURE])
def test_its_calibrated_probabilities_are_the_mean_of_its_members(temperature: float) -> None:
    of_members = [calibrated(probabilities(member), temperature) for member in MEMBERS]
    assert np.ptp(of_members, axis=0).max() > 0.05
    together_NC = calibrated(probabilities(Ensemble(MEMBERS, temperature)), temperature)
    np.testing.assert_allclose(together_NC, np.mean(of_members, axis=0), atol=1e-6)


def test_a_sure_member_does_not_make_it_infinite() -> None:
    sure = network(0)
    sure.head.get_submodule("logits").weight.data *= 1e6
    with torch.no_grad():
        logits_NC = forward(Ensemble([sure, sure], 0.2), as_grey(torch.from_numpy(IMAGES_NHW)), "unit")
    assert logits_NC.isfinite().all()


def test_a_bundles_config_and_weights_give_it_again() -> None:
    weights = safetensors.torch.save(joined_states(member.state_dict() for member in MEMBERS))
    again = build_model(model_config(6, "abc", members=3, temperature=TEMPERATURE), weights)
    np.testing.assert_array_equal(probabilities(again), probabilities(Ensemble(MEMBERS, TEMPERATURE)))
    for members in (1, 2, 4):
        with pytest.raises(BundleError, match="does not have the weights of the model"):
            build_model(model_config(6, "abc", members), weights)


def test_its_maps_are_the_mean_of_its_members_maps() -> None:
    ensemble, classes_NK = Ensemble(MEMBERS, TEMPERATURE), np.array([[0, 2], [1, 1], [2, 0], [0, 1], [1, 2]])
    labels_N = classes_NK[:, 0]
    maps_NKhw, probabilities_NC = grad_cam(ensemble, IMAGES_NHW, classes_NK, "unit", scale=1e9)
    of_members = [grad_cam(member, IMAGES_NHW, classes_NK, "unit", scale=1e9)[0] for member in MEMBERS]
    np.testing.assert_allclose(maps_NKhw, np.mean(of_members, axis=0), atol=1e-12)
    np.testing.assert_allclose(probabilities_NC, probabilities(ensemble), atol=1e-6)
    assert evidence_scale(ensemble, IMAGES_NHW, labels_N, "unit") == pytest.approx(1e9 * maps_NKhw[:, 0].max())


def test_its_features_are_those_of_its_first_member() -> None:
    ensemble, images, rows = Ensemble(MEMBERS, TEMPERATURE), torch.from_numpy(IMAGES_NHW), np.arange(5)
    features_ND = pooled_features(ensemble, images, rows, "unit")
    assert features_ND.shape == (5, feature_channels(ensemble))
    np.testing.assert_array_equal(features_ND, pooled_features(MEMBERS[0], images, rows, "unit"))
