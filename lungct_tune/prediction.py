"""From a bundle's folder and images to probabilities: the network, and the temperature that goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lungct_tune.calibration import calibrated
from lungct_tune.experiment.bundle import load_model
from lungct_tune.models.preprocessing import as_grey, forward

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lungct_tune.models.truncated_resnet import CutResNet

BATCH = 32


def predict(folder: Path | str, images_NHW: np.ndarray) -> np.ndarray:
    """A bundle's calibrated probabilities, float64 (N, classes), in the order of its config.json's classes.

    Args:
        folder: the bundle; it is verified first.
        images_NHW: uint8 grey, as `read_images` decodes them at the bundle's `image_size`; may be memory-mapped.

    Raises:
        BundleError: the bundle is incomplete or altered.
    """
    model, config = load_model(folder)
    probabilities_NC, calibration = uncalibrated(model, config, images_NHW), config["calibration"]
    return calibrated(probabilities_NC, calibration["temperature"]) if calibration else probabilities_NC


def uncalibrated(model: CutResNet, config: Mapping[str, Any], images_NHW: np.ndarray) -> np.ndarray:
    """The probabilities as the network gives them, (N, classes).

    Args:
        model, config: of `load_model`; the model is on the CPU again afterwards.
        images_NHW: as for `predict`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    probabilities = [np.empty((0, len(config["classes"])))]
    with torch.inference_mode():
        for start in range(0, len(images_NHW), BATCH):
            grey_N1HW = as_grey(torch.tensor(images_NHW[start : start + BATCH]).to(device))
            logits_NC = forward(model, grey_N1HW, config["settings"]["normalisation"])
            probabilities.append(logits_NC.softmax(dim=1).cpu().numpy())
    model.cpu()
    return np.concatenate(probabilities)
