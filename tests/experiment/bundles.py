"""Small experiments with bundles that no search has made."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment.bundle import as_json, write_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import BundleMetrics, SearchCost, TestMetrics, metrics_json

JUDGED = evaluate_predictions(
    np.arange(8) % 4,
    np.eye(4)[[0, 1, 2, 3, 0, 1, 3, 2]],
    ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma"),
    np.arange(8),
    references={"majority class": ("normal", np.full(8, 2))},
)

BEST = {"trial": 3, "balanced_accuracy": 0.875, "frozen_depth": 0, "epochs": 4} | PUBLISHED.as_dict()
SEARCH = SearchCost(
    trials=5, epochs=20, wall_s=9.0, training_s=0.0, slots=1, overhead_ratio=None, ended={"completed": 5}
)


def files_of_a_bundle(model: bytes = b"weights", test: TestMetrics | None = JUDGED) -> dict[str, bytes]:
    config = {
        "model": {"truncation_depth": 20, "dropout": 0.5},
        "classes": ["cancer", "normal"],
        "training": {"configuration": PUBLISHED.as_dict(), "epochs": 4},
        "versions": {"torch": "2"},
        "preprocessing": {"image_size": 64},
        "calibration": None,
        "settings": {"name": "one", "trials": 8, "normalisation": "imagenet"},
    }
    metrics = BundleMetrics(PHANTOMS, baseline_trial=None, best_trial=BEST, search=SEARCH, test=test)
    return {
        "model.safetensors": model,
        "config.json": as_json(config),
        "metrics.json": metrics_json(metrics),
        "trials.csv": b"trial\n3\n",
    }


def begun(storage: str | Path, name: str = "one") -> Experiment:
    experiment = Experiment.at(str(storage), name)
    experiment.write("settings.yaml", b"trials: 8\n")
    return experiment


def finished(storage: str | Path, model: bytes = b"weights") -> Experiment:
    experiment = begun(storage)
    write_bundle(experiment, files_of_a_bundle(model))
    return experiment


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
