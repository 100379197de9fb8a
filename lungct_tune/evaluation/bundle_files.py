"""Makes the bundle of a search, from its best trial so far or from the final model with its test figures."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import optuna
import pandas as pd
import safetensors.torch
import yaml

from lungct_tune.auditing.findings import Audit
from lungct_tune.auditing.shortcuts import most_similar, predict_by_shortcuts
from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.config.settings import Settings
from lungct_tune.data import ImageSet, group_overlap
from lungct_tune.data.decode import RESIZING
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.data.seen_images import list_learned
from lungct_tune.data.split import DataSplit
from lungct_tune.evaluation.calibration import calibrated, fit_temperature
from lungct_tune.evaluation.inference import build_model
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.evaluation.operating_point import choose_operating_point
from lungct_tune.evaluation.training_features import TrainingFeatures, can_hold_out
from lungct_tune.experiment.bundle import AUDIT, LEARNED, RetrainedModel, as_json, versions
from lungct_tune.experiment.folder import VALID, trial_folder
from lungct_tune.experiment.looks import count_look
from lungct_tune.experiment.metrics import (
    HALF,
    SHORTCUT,
    BundleMetrics,
    OperatingPoint,
    SeedComparison,
    TemperatureScaling,
    TestMetrics,
)
from lungct_tune.experiment.model_config import ModelConfig
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.experiment.results import Bundle
from lungct_tune.experiment.study import finished_trials, search_cost
from lungct_tune.experiment.trial import BASELINE, TrialRecord
from lungct_tune.models.ensemble import joined_states
from lungct_tune.models.gradcam import evidence_scale
from lungct_tune.models.preprocessing import NORMALISATIONS
from lungct_tune.models.truncated_resnet import HEAD_WIDTHS

_log = logging.getLogger(__name__)

MAPS = 32
"""Training images whose Grad-CAM maps give the common scale of all maps."""


@dataclass(frozen=True, eq=False)
class BundleFiles:
    """Makes the bundles of a search."""

    plan: Plan
    split: DataSplit
    audit: Audit
    study: optuna.Study
    slots: int

    def so_far(self, best: TrialRecord, weights: bytes) -> dict[str, bytes]:
        """The files of a trial's bundle, which has no test figures.

        Args:
            weights: of the trial, safetensors.
        """
        return self.files(self._bundle(best, weights, *self._calibrate(best)))

    def prepare(self) -> None:
        """Computes what takes time and does not depend on the final model."""
        self._learned, self._shortcuts  # noqa: B018

    def final(
        self,
        best: TrialRecord,
        retrained: Sequence[RetrainedModel],
        published: tuple[TrialRecord, Sequence[RetrainedModel]] | None = None,
        seeds: SeedComparison | None = None,
    ) -> Bundle:
        """The final bundle of the search, with its test figures.

        Args:
            retrained: the best trial's configuration, retrained: one model, or the members of an ensemble, whose
                calibrated probabilities are averaged.
            published: the trial of the published configuration, and its retrained models, averaged in the same way.
            seeds: the winner trained with other seeds.

        Raises:
            StorageError: the storage refuses to count how often the test split is looked at.
        """
        images, test = self.split.images, self.split.test_rows
        rows = images.table.iloc[test]
        labels_N, groups_N = (rows[column].to_numpy() for column in ("label", "group"))
        scaling, point = self._calibrate(best)
        probabilities_NC = _averaged(retrained, scaling)
        uncalibrated_NC = np.mean([model.probabilities_NC for model in retrained], axis=0)
        figures = evaluate_predictions(
            labels_N,
            probabilities_NC,
            images.classes,
            groups_N,
            uncalibrated_NC=uncalibrated_NC if scaling else None,
            scaling=scaling,
            references=self._references(published),
            overlap_N=group_overlap(images, self.split.split),
            similarity_N=None if images.patients_known else most_similar(images, test, self.split.searched_rows)[0],
            threshold=point.threshold if point else HALF,
            at_95_specificity=point.at_95_specificity if point else None,
        )
        predictions = Predictions(images.classes, rows["path"].to_numpy(), labels_N, probabilities_NC, groups_N)
        began = self.study.get_trials(deepcopy=False)[0].datetime_start
        looks = count_look(self.plan.experiment, self.split, began)
        bundle = self._bundle(
            best, _weights(retrained), scaling, point, figures, predictions, seeds, looks, len(retrained)
        )
        if retrained[0].features is None:  # by version 0.1, which did not mirror the test images
            network = bundle.config.model.model_copy(update={"mirrored": False})
            bundle = replace(bundle, config=bundle.config.model_copy(update={"model": network}))
        return replace(bundle, features=self._training_features(bundle, retrained[0].features))

    def files(self, bundle: Bundle) -> dict[str, bytes]:
        """All files of a bundle by name, without its pages."""
        trials = pd.DataFrame([trial.row() for trial in finished_trials(self.study)])
        return bundle.files | {
            LEARNED: self._learned,
            AUDIT: as_json(self.audit.as_dict()),
            "trials.csv": trials.to_csv(index=False).encode(),
        }

    def _references(
        self, published: tuple[TrialRecord, Sequence[RetrainedModel]] | None
    ) -> dict[str, tuple[str, np.ndarray]]:
        """Other predictions for the test images, by kind: a name and the predictions."""
        images, test, searched = self.split.images, self.split.test_rows, self.split.searched_rows
        majority = int(np.bincount(images.table["label"].to_numpy()[searched]).argmax())
        references = {"majority class": (images.classes[majority], np.full(len(test), majority))}
        references |= {f"{SHORTCUT}: {rule}": (rule, predicted_N) for rule, predicted_N in self._shortcuts.items()}
        if published:
            trial, models = published
            averaged_NC = _averaged(models, self._calibrate(trial)[0])
            references["published"] = str(trial.hyperparameters), averaged_NC.argmax(axis=1)
        return references

    def _training_features(self, bundle: Bundle, kept: bytes | None) -> bytes | None:
        """training_features.safetensors; None without a threshold, or if an earlier version kept no features.

        There is no threshold if train and validation are of one group, such as one hospital: distances in the group
        that the Gaussian is fitted to are too short for images of others.
        """
        if kept is None:
            return None
        table, images_NHW = self.split.images.table, self.split.images.images_NHW
        with np.load(io.BytesIO(kept)) as sample:
            rows, features_ND = sample["rows"], sample["features"]
        groups_N = table["group"].to_numpy()[rows]
        if not can_hold_out(groups_N):
            return None
        some = np.sort(np.random.default_rng(0).permutation(rows)[:MAPS])
        model = build_model(bundle.config, bundle.weights)
        scale = evidence_scale(
            model, images_NHW[some], table["label"].to_numpy()[some], self.plan.settings.normalisation
        )
        return TrainingFeatures.fit(features_ND, groups_N, scale).as_bytes()

    def _calibrate(self, best: TrialRecord) -> tuple[TemperatureScaling | None, OperatingPoint | None]:
        """Temperature and operating point for a trial's configuration, on images that it was not trained on."""
        file = f"{trial_folder(best.number)}/{VALID}"
        try:
            uncalibrated_NC = np.load(io.BytesIO(self.plan.experiment.read(file) or b""))
        except (ValueError, EOFError):  # `clean` has removed it, or a machine that was lost has damaged it
            what = f"trial {best.number} has no calibration and no operating point"
            _log.warning("%s is missing or damaged, so %s", file, what)
            return None, None
        table = self.split.images.table.iloc[self.split.validation_rows]
        what = f"the winner's {'out-of-fold' if self.plan.settings.cross_validates else 'validation'} predictions"
        labels_N, groups_N = table["label"].to_numpy(), table["group"].to_numpy()
        scaling = fit_temperature(labels_N, uncalibrated_NC, groups_N, what)
        probabilities_NC = calibrated(uncalibrated_NC, scaling.temperature)
        classes = self.split.images.classes
        return scaling, choose_operating_point(labels_N, probabilities_NC, classes, groups_N, what)

    def _bundle(
        self,
        best: TrialRecord,
        weights: bytes,
        scaling: TemperatureScaling | None,
        point: OperatingPoint | None,
        test: TestMetrics | None = None,
        predictions: Predictions | None = None,
        seeds: SeedComparison | None = None,
        looks: int | None = None,
        members: int = 1,
    ) -> Bundle:
        settings, trials = self.plan.settings, finished_trials(self.study)
        metrics = BundleMetrics(
            data=PHANTOMS if settings.data is None else str(settings.data),
            baseline_trial=next((trial.row() for trial in trials if trial.number == BASELINE and trial.last), None),
            best_trial=best.row(),
            search=search_cost(self.study, trials, self.slots),
            test=test,
            looks=looks,
            seeds=seeds,
        )
        config = describe_model(
            settings, self.split.images, best.hyperparameters, len(best.history), scaling, point, members
        )
        return Bundle(weights, config, metrics, predictions)

    @cached_property
    def _shortcuts(self) -> dict[str, np.ndarray]:
        return predict_by_shortcuts(self.split.images, self.split.searched_rows, self.split.test_rows)

    @cached_property
    def _learned(self) -> bytes:
        return list_learned(self.split.images, self.split.searched_rows)


def _averaged(models: Sequence[RetrainedModel], scaling: TemperatureScaling | None) -> np.ndarray:
    """The mean of the models' calibrated probabilities, (N, C)."""
    temperature = scaling.temperature if scaling else 1.0
    return np.asarray(np.mean([calibrated(model.probabilities_NC, temperature) for model in models], axis=0))


def _weights(models: Sequence[RetrainedModel]) -> bytes:
    """model.safetensors of one model, or of an ensemble of several."""
    if len(models) == 1:
        return models[0].weights
    return safetensors.torch.save(joined_states(safetensors.torch.load(model.weights) for model in models))


def describe_model(
    settings: Settings,
    images: ImageSet,
    hyperparameters: Hyperparameters,
    epochs: int,
    scaling: TemperatureScaling | None,
    point: OperatingPoint | None = None,
    members: int = 1,
) -> ModelConfig:
    """The content of config.json.

    Args:
        scaling: None if the network's probabilities are not scaled.
        point: the operating point; None if the classes are not normal and cancers.
        members: how many such networks the model has; several are an ensemble.
    """
    mean, deviation = NORMALISATIONS[settings.normalisation]
    window = settings.ct_window
    content = {
        "model": {
            "architecture": "ResNet50 cut after its k-th ReLU, pooling, batch normalisation, three dense layers",
            "truncation_depth": hyperparameters.truncation_depth,
            "dropout": hyperparameters.dropout,
            "members": members,
            "mirrored": hyperparameters.mirrored,
            "head_widths": list(HEAD_WIDTHS),
        },
        "classes": list(images.classes),
        "preprocessing": {
            "image_size": settings.image_size,
            "resizing": RESIZING,
            "window": window._asdict() if window else None,
            "mode": "8-bit grey, as three equal channels scaled to 0..1",
            "mean": list(mean),
            "deviation": list(deviation),
        },
        "calibration": scaling,
        "operating_point": point,
        "training": {"configuration": hyperparameters.as_dict(), "epochs": epochs, "seed": settings.seed},
        "settings": yaml.safe_load(settings.as_yaml()),
        "data_fingerprint": images.fingerprint,
        "versions": versions(),
    }
    return ModelConfig.model_validate(content)
