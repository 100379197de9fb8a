"""Loads the model of a bundle, and predicts with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.experiment.bundle import CONFIG, MODEL, BundleError, verify
from lungct_tune.experiment.model_config import read_config
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50

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


def uncalibrated(model: TruncatedResNet50, config: Mapping[str, Any], images_NHW: np.ndarray) -> np.ndarray:
    """The network's own probabilities, without temperature scaling, (N, classes).

    Args:
        model, config: of `load_model`; afterwards the model is on the CPU again.
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


def load_model(folder: Path | str) -> tuple[TruncatedResNet50, dict[str, Any]]:
    """Rebuilds a bundle's model, on the CPU and ready to predict, with its config.json.

    Raises:
        BundleError: the bundle is incomplete or altered, or its config.json has values out of bounds.
    """
    folder = Path(folder)
    verify(folder)
    config = read_config((folder / CONFIG).read_bytes())
    return build_model(config, (folder / MODEL).read_bytes()), config


def build_model(config: Mapping[str, Any], weights: bytes) -> TruncatedResNet50:
    """The model that a bundle's config.json and model.safetensors describe, on the CPU and ready to predict.

    Raises:
        BundleError: the weights are not those of such a model.
    """
    model = TruncatedResNet50(
        config["model"]["truncation_depth"],
        dropout=config["model"]["dropout"],
        classes=len(config["classes"]),
        initialise=False,
    )
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(f"{MODEL} does not have the weights of the model in {CONFIG}: {error}") from error
    return model.eval()
