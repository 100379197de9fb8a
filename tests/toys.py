"""Small trainings and models for tests on CPUs and on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.model_config import ModelConfig
from lungct_tune.models import preprocessing
from lungct_tune.training.trainer import Trainer

PX = 32
SMALL = Hyperparameters(truncation_depth=5, backbone_lr=1e-3, head_lr=1e-2)
NO_CHANCE = replace(SMALL, frozen_share=1.0, dropout=0.0)
"""Frozen and without dropout: what is left does not depend on how a batch is shared."""


def toy_data(n: int = 48) -> tuple[Tensor, Tensor]:
    """Four classes of noise that differ in brightness, the first twice as common as the others."""
    generator = torch.Generator().manual_seed(7)
    labels_N = (torch.arange(n) % 5 - 1).clamp(min=0)
    noise_NHW = torch.randint(60, (n, PX, PX), generator=generator)
    return (noise_NHW + 60 * labels_N[:, None, None]).to(torch.uint8), labels_N


def model_config(depth: int, classes: str = "abcd", members: int = 1, temperature: float | None = None) -> ModelConfig:
    """As much of a bundle's config.json as the model depends on. The classes have names of a letter."""
    fitted_on = {"images": 6, "groups": 2, "what": "made up"}
    return ModelConfig.model_validate(
        {
            "model": {"truncation_depth": depth, "dropout": 0.5, "members": members},
            "classes": list(classes),
            "preprocessing": {"image_size": PX},
            "calibration": temperature and {"temperature": temperature, "fitted_on": fitted_on},
            "training": {"configuration": {}, "epochs": 1},
            "versions": {},
            "settings": {"name": "one", "normalisation": "imagenet", "trials": 1},
        }
    )


def training(configuration: Hyperparameters = SMALL, **changes: Any) -> Trainer:
    images_NHW, labels_N = toy_data()
    arguments: dict[str, Any] = {
        "images_NHW": images_NHW,
        "labels_N": labels_N,
        "train_indices": range(40),
        "classes": 4,
        "epochs": 4,
        "batch_size": 12,
        "seed": 3,
        "normalisation": "imagenet",
        "backbone_state": None,
        "device": "cpu",
    }
    return Trainer(configuration, **arguments | changes)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


def compute_in(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes in this precision on every device, in training and in prediction."""
    for of_what in ("precision_for", "training_precision_for"):
        monkeypatch.setattr(preprocessing, of_what, lambda device: precision)
