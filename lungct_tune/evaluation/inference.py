"""Rebuilds the network of a bundle. `Classifier` classifies images with it."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch

from lungct_tune.experiment.bundle import CONFIG, MODEL, BundleError, verify
from lungct_tune.experiment.model_config import ModelConfig, read_config
from lungct_tune.models.ensemble import Ensemble, Model
from lungct_tune.models.truncated_resnet import TruncatedResNet50


def load_model(folder: Path | str) -> tuple[Model, ModelConfig]:
    """Rebuilds a bundle's model, on the CPU and ready to predict, with its config.json.

    Raises:
        BundleError: the bundle is incomplete or altered, or its config.json has values out of bounds.
    """
    folder = Path(folder)
    verify(folder)
    config = read_config((folder / CONFIG).read_bytes())
    return build_model(config, (folder / MODEL).read_bytes()), config


def build_model(config: ModelConfig, weights: bytes) -> Model:
    """The model that a bundle's config.json and model.safetensors describe, on the CPU and ready to predict.

    Raises:
        BundleError: the weights are not those of such a model.
    """
    networks = [
        TruncatedResNet50(
            config.model.truncation_depth,
            dropout=config.model.dropout,
            classes=len(config.classes),
            mirrored=config.model.mirrored,
            initialise=False,
        )
        for _ in range(config.model.members)
    ]
    temperature = config.calibration.temperature if config.calibration else 1.0
    model: Model = networks[0] if len(networks) == 1 else Ensemble(networks, temperature)
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise BundleError(f"{MODEL} does not have the weights of the model in {CONFIG}: {error}") from error
    return model.eval()
