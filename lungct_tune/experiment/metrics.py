"""What metrics.json holds: every figure of a bundle's model, and of `lungct_tune.evaluate`.

A field is the key of the same name in the file. Where it is not, the alias is the key: files keep the keys that they
have always had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from lungct_tune.experiment.bundle import as_json


@dataclass(frozen=True)
class Figure:
    """A figure, None where the images do not define it (the AUROC of a class without images)."""

    value: float | None
    ci95: tuple[float, float] | None
    """The limits of its 95 % interval; None where there is none (see `ClusterBootstrap`)."""


@dataclass(frozen=True)
class ClassMetrics:
    """One class against the rest."""

    n: int
    """Images of the class."""
    sensitivity: Figure
    specificity: Figure
    ppv: Figure
    npv: Figure
    auroc: Figure
    average_precision: Figure


@dataclass(frozen=True)
class CancerMetrics:
    """All cancers together against normal."""

    n_cancer: int
    n_normal: int
    table: list[list[int]]
    """Images: rows are normal and cancer, columns predicted normal and predicted cancer."""
    sensitivity: Figure
    specificity: Figure
    ppv: Figure
    npv: Figure
    auroc: Figure
    sensitivity_at_95_specificity: Figure


@dataclass(frozen=True)
class FittedOn:
    """The images that a temperature was fitted on."""

    images: int
    groups: int
    what: str
    """Whose predictions they were, in words."""


@dataclass(frozen=True)
class TemperatureScaling:
    """A fitted temperature, as config.json holds it too."""

    temperature: float
    fitted_on: FittedOn


@dataclass(frozen=True)
class CalibrationErrors:
    """How far probabilities are off."""

    brier: Figure
    ece: Figure
    """The expected calibration error."""


ReliabilityBins = list[tuple[float, float, int]]
"""Of each bin that has images: mean confidence, accuracy, number of images."""


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram, before and after temperature scaling."""

    before: ReliabilityBins
    after: ReliabilityBins | None


@dataclass(frozen=True)
class CalibrationMetrics:
    """Calibration before and after temperature scaling; what is of the scaling is None where there was none."""

    temperature: float | None
    fitted_on: FittedOn | None
    before: CalibrationErrors
    after: CalibrationErrors | None
    reliability: Reliability


@dataclass(frozen=True)
class ReferenceAccuracy:
    """The accuracy of something else on the same images."""

    name: str
    """What it is: a class, a rule in `lungct_tune.auditing.shortcuts.RULES`, hyperparameters."""
    accuracy: Figure


@dataclass(frozen=True)
class Reference(ReferenceAccuracy):
    """Something else on the same images, compared with the model."""

    balanced_accuracy: Figure
    difference: Figure
    """The model's accuracy less this one, paired image by image."""
    mcnemar_p: float


@dataclass(frozen=True)
class WithoutOverlap:
    """The images that share no group with those that the model has learned from."""

    n: int
    accuracy: Figure
    references: dict[str, ReferenceAccuracy]


@dataclass(frozen=True)
class TestMetrics:
    """All figures of a model on images that it had not seen."""

    n: int
    """Images."""
    groups: int
    interval: str
    """How the intervals were made, in words."""
    accuracy: Figure
    balanced_accuracy: Figure
    macro_f1: Figure
    per_class: dict[str, ClassMetrics]
    cancer_vs_normal: CancerMetrics | None
    """None where the classes are not normal and cancers."""
    calibration: CalibrationMetrics
    confusion_matrix: list[list[int]]
    """Images: rows are the classes, columns the predicted classes."""
    references: dict[str, Reference]
    """By kind: "majority class", "shortcut", "published"."""
    without_overlap: Annotated[WithoutOverlap | None, Field(alias="leak_free")]
    """None where no image shares a group with those that the model has learned from."""


@dataclass(frozen=True)
class BundleMetrics:
    """metrics.json of a bundle."""

    data: str
    baseline_trial: dict[str, Any] | None
    """The row of trials.csv of the published configuration; None where no epoch of it has ended."""
    best_trial: dict[str, Any]
    search: dict[str, Any]
    """What the search cost, see `lungct_tune.experiment.study.effort`."""
    test: TestMetrics | None
    """None before the search has ended."""
    seeds: dict[str, Any] | None = None
    """Of `lungct_tune.experiment.study.over_seeds`; None where the winner was not trained with other seeds."""


@dataclass(frozen=True)
class LeftOut:
    """How many images `evaluate` could not judge, by the reason."""

    other: int
    unreadable: int
    under_several_classes: int


@dataclass(frozen=True)
class LearnedFrom:
    """How many images the model has learned from."""

    same_file: Annotated[int, Field(alias="same file")]
    looks_alike: Annotated[int, Field(alias="looks alike")]
    """Other files that look like an image that it has learned from."""

    @property
    def total(self) -> int:
        return self.same_file + self.looks_alike


@dataclass(frozen=True)
class EvaluationMetrics:
    """metrics.json of `lungct_tune.evaluate`."""

    data: str
    bundle: str
    class_map: Annotated[dict[str, str], Field(alias="map")]
    """The class that the images of a folder count as."""
    left_out: LeftOut
    learned_from: LearnedFrom
    test: TestMetrics


def metrics_json(metrics: BundleMetrics | EvaluationMetrics) -> bytes:
    """metrics.json."""
    content = TypeAdapter(type(metrics)).dump_python(metrics, by_alias=True)
    if content["test"] is None:
        del content["seeds"]  # a bundle of a search that goes on has never had this key
    return as_json(content)


def read_metrics(content: bytes) -> BundleMetrics:
    """The figures of a bundle.

    Raises:
        pydantic.ValidationError: it is no metrics.json of a bundle.
    """
    return TypeAdapter(BundleMetrics).validate_json(content)
