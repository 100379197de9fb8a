"""What a search has come to, as a bundle: of its best trial so far, or of the final model when that has been judged."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import pandas as pd
import yaml

from lungct_tune.auditing.shortcuts import best_shortcut
from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import Settings
from lungct_tune.data import ImageSet, group_overlap
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.data.seen_images import list_learned
from lungct_tune.data.split import DataSplit
from lungct_tune.evaluation.calibration import calibrated, fit_temperature
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment import bundle
from lungct_tune.experiment.bundle import RetrainedModel, versions
from lungct_tune.experiment.folder import VALID, trial_folder
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import effort, finished_trials
from lungct_tune.experiment.trial import BASELINE, TrialRecord


@dataclass(frozen=True, eq=False)
class BundleFiles:
    """Makes the bundles of a search."""

    plan: Plan
    split: DataSplit
    audit: Mapping[str, Any]
    study: optuna.Study
    slots: int

    def so_far(self, best: TrialRecord, weights: bytes) -> dict[str, bytes]:
        """The files of a trial's bundle, which says nothing about the test split.

        Args:
            weights: the trial's best epoch's, safetensors.
        """
        return self._files(best, weights, self._calibration(best), test=None)

    def final(
        self,
        best: TrialRecord,
        judged: RetrainedModel,
        published: tuple[TrialRecord, RetrainedModel] | None = None,
        seeds: Mapping[str, Any] | None = None,
    ) -> dict[str, bytes]:
        """The files of the search's bundle, but for its pages.

        Args:
            judged: the best trial's configuration, retrained.
            published: the trial of the published configuration, and that retrained too.
            seeds: of `over_seeds`.
        """
        images, test, searched = self.split.images, self.split.test_rows, self.split.searched_rows
        labels_N, groups_N = (images.table[column].to_numpy() for column in ("label", "group"))
        majority = int(np.bincount(labels_N[searched]).argmax())
        references = {
            "majority class": (images.classes[majority], np.full(len(test), majority)),
            "shortcut": best_shortcut(images, searched, test),
        }
        if published:
            name, other = str(published[0].hyperparameters), published[1]
            references["published"] = name, other.probabilities_NC.argmax(axis=1)
        scaling, probabilities_NC = self._calibration(best), judged.probabilities_NC
        if scaling:
            probabilities_NC = calibrated(judged.probabilities_NC, scaling["temperature"])
        figures = evaluate_predictions(
            labels_N[test],
            probabilities_NC,
            images.classes,
            groups_N[test],
            uncalibrated_NC=judged.probabilities_NC if scaling else None,
            calibration=scaling,
            references=references,
            overlaps_N=group_overlap(images, self.split.split),
        )
        rows = images.table.iloc[test]
        predictions = list_predictions(rows, labels_N[test], probabilities_NC, images.classes)
        files = self._files(best, judged.weights, scaling, test=figures, seeds=seeds)
        return files | {bundle.PREDICTIONS: predictions}

    def _calibration(self, best: TrialRecord) -> dict[str, Any] | None:
        """The temperature for a trial's configuration, from images that the trial was not trained on."""
        if (kept := self.plan.experiment.read(f"{trial_folder(best.number)}/{VALID}")) is None:
            return None
        table = self.split.images.table.iloc[self.split.validation_rows]
        what = f"the winner's {'out-of-fold' if self.plan.settings.folds else 'validation'} predictions"
        return fit_temperature(table["label"].to_numpy(), np.load(io.BytesIO(kept)), table["group"].to_numpy(), what)

    def _files(
        self, best: TrialRecord, weights: bytes, calibration: Mapping[str, Any] | None, **judged: Any
    ) -> dict[str, bytes]:
        assert best.best is not None  # it completed
        settings, trials = self.plan.settings, finished_trials(self.study)
        config = describe_model(settings, self.split.images, best.hyperparameters, best.best.epoch, calibration)
        metrics = {
            "data": PHANTOMS if settings.data is None else str(settings.data),
            "baseline_trial": next((trial.row() for trial in trials if trial.number == BASELINE and trial.best), None),
            "best_trial": best.row(),
            "search": effort(self.study, trials, self.slots),
        } | judged
        table = pd.DataFrame([trial.row() for trial in trials])
        return {
            bundle.MODEL: weights,
            bundle.CONFIG: bundle.as_json(config),
            bundle.METRICS: bundle.as_json(metrics),
            bundle.LEARNED: self._learned,
            bundle.AUDIT: bundle.as_json(self.audit),
            "trials.csv": table.to_csv(index=False).encode(),
        }

    @cached_property
    def _learned(self) -> bytes:
        return list_learned(self.split.images, self.split.searched_rows)


def describe_model(
    settings: Settings,
    images: ImageSet,
    configuration: Hyperparameters,
    epochs: int,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """config.json: all that rebuilds the model and its preprocessing, and what made it.

    Args:
        calibration: of `fit_temperature`; None leaves the probabilities as the network gives them.
    """
    from lungct_tune.models.preprocessing import NORMALISATIONS
    from lungct_tune.models.truncated_resnet import HEAD_WIDTHS

    mean, deviation = NORMALISATIONS[settings.normalisation]
    return {
        "model": {
            "architecture": "ResNet50 cut after its k-th ReLU, pooling, batch normalisation, three dense layers",
            "truncation_depth": configuration.truncation_depth,
            "dropout": configuration.dropout,
            "head_widths": list(HEAD_WIDTHS),
        },
        "classes": list(images.classes),
        "preprocessing": {
            "image_size": settings.image_size,
            "mode": "8-bit grey, as three equal channels scaled to 0..1",
            "mean": list(mean),
            "deviation": list(deviation),
        },
        "calibration": calibration,
        "training": {"configuration": configuration.as_dict(), "epochs": epochs, "seed": settings.seed},
        "settings": yaml.safe_load(settings.as_yaml()),
        "data_fingerprint": images.fingerprint,
        "versions": versions(),
    }


def list_predictions(
    rows: pd.DataFrame, labels_N: np.ndarray, probabilities_NC: np.ndarray, classes: Sequence[str]
) -> bytes:
    """predictions.csv: a row an image, with path, class, predicted class, probabilities (calibrated), group.

    Args:
        rows: of an `ImageSet`'s table.
        classes: what labels and columns mean.
    """
    table = pd.DataFrame(
        {
            "path": rows["path"].to_numpy(),
            "class": [classes[label] for label in labels_N],
            "predicted": [classes[label] for label in probabilities_NC.argmax(axis=1)],
        }
    )
    for c, name in enumerate(classes):
        table[f"p_{name.replace(' ', '_')}"] = probabilities_NC[:, c]
    table["group"] = rows["group"].to_numpy()
    return table.to_csv(index=False).encode()
