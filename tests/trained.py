"""A bundle of a small training, made without Ray and without a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import Settings
from lungct_tune.data import read_images
from lungct_tune.data.seen_images import list_learned
from lungct_tune.evaluation.bundle_files import describe_model
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.evaluation.training_features import TrainingFeatures
from lungct_tune.experiment.bundle import (
    CONFIG,
    FEATURES,
    LEARNED,
    METRICS,
    MODEL,
    PREDICTIONS,
    as_json,
    write_bundle,
)
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import BundleMetrics, FittedOn, OperatingPoint, TemperatureScaling, metrics_json
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.models.features import pooled_features
from lungct_tune.models.gradcam import evidence_scale
from lungct_tune.training.trainer import Trainer

SIZE = 32
TEMPERATURE, THRESHOLD = 1.5, 0.6


def write_trained_bundle(storage: Path, data: Path, name: str = "one", seed: int = 0) -> Path:
    """The folder of the bundle. It is trained on all images of `data` that are not in its folder test."""
    images = read_images(data, SIZE, progress=False)
    table = images.table
    is_test_N = (table["folder"] == "test").to_numpy()
    learned, test = np.flatnonzero(~is_test_N), table[is_test_N]
    configuration = Hyperparameters(truncation_depth=4, dropout=0.0, augmentation=0.0, backbone_lr=1e-2, head_lr=1e-2)
    trainer = Trainer(
        configuration,
        images_NHW=torch.tensor(images.images_NHW),
        labels_N=torch.tensor(table["label"].to_numpy()),
        train_indices=learned,
        classes=4,
        epochs=6,
        batch_size=14,
        seed=seed,
        normalisation="unit",
        backbone_state=None,
        device="cpu",
    )
    for _ in range(trainer.epochs):
        trainer.train_epoch()
    probabilities_NC = calibrated(trainer.probabilities(np.flatnonzero(is_test_N)), TEMPERATURE)
    labels_N, groups_N = test["label"].to_numpy(), test["group"].to_numpy()
    settings = Settings(name=name, data=data, image_size=SIZE, normalisation="unit", weights="none")
    made_up = FittedOn(images=6, groups=2, what="made up")
    scaling, point = TemperatureScaling(TEMPERATURE, made_up), OperatingPoint(THRESHOLD, made_up)
    figures = evaluate_predictions(labels_N, probabilities_NC, images.classes, groups_N, threshold=THRESHOLD)
    features_ND = pooled_features(trainer.average.model, trainer.images_NHW, learned, "unit")
    labels_M = table["label"].to_numpy()[learned]
    scale = evidence_scale(trainer.average.model, images.images_NHW[learned], labels_M, "unit")
    best = {"trial": 3, "balanced_accuracy": 0.5}
    files = {
        MODEL: safetensors.torch.save(trainer.model_state()),
        CONFIG: as_json(describe_model(settings, images, configuration, trainer.epochs, scaling, point).model_dump()),
        METRICS: metrics_json(BundleMetrics("phantoms", None, best, {"trials": 1}, figures)),
        LEARNED: list_learned(images, learned),
        FEATURES: TrainingFeatures.fit(features_ND, table["group"].to_numpy()[learned], scale).as_bytes(),
        PREDICTIONS: Predictions(
            images.classes, test["path"].to_numpy(), labels_N, probabilities_NC, groups_N
        ).as_csv(),
    }
    experiment = Experiment.at(str(storage), name)
    write_bundle(experiment, files)
    return Path(experiment.uri, "best")
