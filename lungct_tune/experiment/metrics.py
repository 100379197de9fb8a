"""The content of metrics.json: every figure of a bundle's model, and of `lungct_tune.evaluate`.

A field's name is its key in the file, unless the field has an alias. Then the alias is the key, so that the keys stay
the same in every version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field, FiniteFloat, TypeAdapter

from lungct_tune.experiment.bundle import METRICS, as_json
from lungct_tune.experiment.form import check_form, read_json

HALF = 0.5
"""The operating point of bundles that have chosen none."""

_Probability = Annotated[FiniteFloat, Field(ge=0, le=1)]

MAJORITY, SHORTCUT, PUBLISHED = "majority class", "shortcut", "published"
"""The kinds of predictions that a model is compared with."""


@dataclass(frozen=True)
class Figure:
    """A figure with its interval."""

    value: float | None
    """None where the images do not define it, for example the AUROC of a class without images."""
    ci95: tuple[float, float] | None
    """The limits of its 95 % interval; None where it has none (see `ClusterBootstrap`)."""


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
class RatesAt:
    """Both rates for cancer at a threshold."""

    threshold: float
    sensitivity: Figure
    specificity: Figure


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
    """At the best threshold for these very images, so it is too high."""
    threshold: float = HALF
    """An image counts as cancer if the probability of all cancers together is above it."""
    at_95_specificity: RatesAt | None = None
    """At the threshold that `OperatingPoint` has for it, from other images; None in bundles of earlier versions."""


@dataclass(frozen=True)
class FittedOn:
    """The images that a temperature was fitted on, or that an operating point was chosen on."""

    images: int
    groups: int
    what: str
    """Whose predictions they were, as text."""


@dataclass(frozen=True)
class TemperatureScaling:
    """A fitted temperature, as config.json holds it too."""

    temperature: Annotated[FiniteFloat, Field(ge=0.01, le=100)]
    fitted_on: FittedOn


@dataclass(frozen=True)
class OperatingPoint:
    """The probability of cancer above which an image counts as cancer, as config.json holds it too."""

    threshold: _Probability
    chosen_on: FittedOn
    at_95_specificity: _Probability | None = None
    """The lowest threshold with a specificity of at least 95 % on the same images."""


@dataclass(frozen=True)
class CalibrationErrors:
    """The calibration errors of probabilities."""

    brier: Figure
    ece: Figure
    """The expected calibration error."""


ReliabilityBins = list[tuple[float, float, int]]
"""For each bin that has images: mean confidence, accuracy, number of images."""


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram, before and after temperature scaling."""

    before: ReliabilityBins
    after: ReliabilityBins | None


@dataclass(frozen=True)
class CalibrationMetrics:
    """Calibration before and after temperature scaling. Without scaling, the fields about it are None."""

    temperature: float | None
    fitted_on: FittedOn | None
    before: CalibrationErrors
    after: CalibrationErrors | None
    reliability: Reliability


@dataclass(frozen=True)
class ReferenceAccuracy:
    """The accuracy of another way to predict the classes of the same images."""

    name: str
    """Which one: a class, a rule in `lungct_tune.auditing.shortcuts.RULES`, or hyperparameters."""
    accuracy: Figure
    balanced_difference: Figure | None = None
    """The model's balanced accuracy minus this one, paired by image; None in bundles of version 0.1."""


@dataclass(frozen=True, kw_only=True)
class Reference(ReferenceAccuracy):
    """Another way to predict the classes of the same images, compared with the model."""

    balanced_accuracy: Figure
    difference: Figure
    """The model's accuracy minus this one, paired by image."""
    mcnemar_p: float


@dataclass(frozen=True)
class WithoutOverlap:
    """Figures on the images that share no group with the model's training images."""

    n: int
    accuracy: Figure
    references: dict[str, ReferenceAccuracy]
    balanced_accuracy: Figure = Figure(None, None)
    """Not defined in bundles of version 0.1."""
    missing: tuple[str, ...] = ()
    """The classes that have none of these images; empty in bundles of earlier versions."""


@dataclass(frozen=True)
class Likeness:
    """Figures on half of the images of each class, chosen by how much they look like a training image."""

    n: int
    similarity: float
    """Median of the correlation with the most similar training image, at 32 x 32 pixels."""
    accuracy: Figure
    balanced_accuracy: Figure


@dataclass(frozen=True)
class ByLikeness:
    """Figures on the images that look least like the training images, and on the others.

    Images of new patients are unlike the training images. Where patients are not known, the first half says more about
    them than all images do.
    """

    least: Likeness
    most: Likeness


@dataclass(frozen=True)
class TestMetrics:
    """All figures of a model on images that it had not seen."""

    n: int
    """Images."""
    groups: int
    interval: str
    """How the intervals were computed, as text."""
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
    """By kind: `MAJORITY`, `PUBLISHED`, and `SHORTCUT` with the rule's name ("shortcut: histogram"). Bundles of version
    0.1 have one "shortcut", that of the strongest rule on train and validation."""
    without_overlap: Annotated[WithoutOverlap | None, Field(alias="leak_free")]
    """None where no image shares a group with the model's training images."""
    by_likeness: ByLikeness | None = None
    """None where all patients are known or a class has a single image, on other data than the search's, and in bundles
    of version 0.1."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The classes that have none of the images."""
        return tuple(name for name, of_class in self.per_class.items() if not of_class.n)


@dataclass(frozen=True)
class SearchCost:
    """The cost of a search."""

    trials: int
    epochs: int
    wall_s: float
    training_s: float
    """Seconds that slots spent inside epochs, training and validation."""
    slots: int
    overhead_ratio: float | None
    """Slot time divided by `training_s`: 1 means no overhead; None before an epoch has ended. Slot time is slots x wall
    time, without the time in which slots waited for room on the cluster, summed over the runs of a resumed search."""
    ended: dict[str, int]
    """The number of trials by outcome."""
    planned_s: tuple[float, float] | None = None
    """The range of the forecast, for the whole job."""
    took_s: float | None = None
    """The time since the forecast."""


@dataclass(frozen=True)
class SeedScores:
    """The balanced accuracy of a configuration trained with several seeds."""

    balanced_accuracy: list[float]
    mean: float
    sd: float


@dataclass(frozen=True)
class SeedComparison(SeedScores):
    """The winner trained with other seeds, and the published configuration with the same ones."""

    published: SeedScores | None = None
    """None in bundles of version 0.1, and if the winner is the published configuration."""
    difference: Figure | None = None
    """The mean of the differences, paired by seed, with the interval of Student's t over the seeds. It says how far the
    difference depends on the seed, not on the images, which are the same for all."""


@dataclass(frozen=True)
class BundleMetrics:
    """metrics.json of a bundle."""

    data: str
    baseline_trial: dict[str, Any] | None
    """The published configuration's row of trials.csv; None before its first epoch has ended."""
    best_trial: dict[str, Any]
    search: SearchCost
    test: TestMetrics | None
    """None before the search has ended."""
    looks: int | None = None
    """How many searches on the storage had been evaluated on this test split, this one included; None before the search
    has ended, and in bundles of version 0.1."""
    seeds: SeedComparison | None = None
    """None where the winner was not trained with other seeds."""


@dataclass(frozen=True)
class LeftOut:
    """How many images `evaluate` left out, by reason."""

    other: int
    unreadable: int
    under_several_classes: int


@dataclass(frozen=True)
class LearnedFrom:
    """How many of the evaluated images are training images of the model, or look like one."""

    same_file: Annotated[int, Field(alias="same file")]
    """The same file as a training image."""
    looks_alike: Annotated[int, Field(alias="looks alike")]
    """Another file that looks like a training image."""

    @property
    def total(self) -> int:
        return self.same_file + self.looks_alike


@dataclass(frozen=True)
class EvaluationMetrics:
    """metrics.json of `lungct_tune.evaluate`."""

    data: str
    bundle: str
    class_map: Annotated[dict[str, str], Field(alias="map")]
    """The class of the images, by folder."""
    left_out: LeftOut
    learned_from: LearnedFrom
    test: TestMetrics


def metrics_json(metrics: BundleMetrics | EvaluationMetrics) -> bytes:
    """Encodes metrics.json."""
    content = TypeAdapter(type(metrics)).dump_python(metrics, by_alias=True)
    if content["test"] is None:
        del content["seeds"]  # the bundle of a running search does not have this key
    return as_json(content)


def read_metrics(content: bytes) -> BundleMetrics:
    """Reads the metrics.json of a bundle.

    Raises:
        BundleError: it has another form than this version writes.
    """
    metrics: BundleMetrics = check_form(read_json(content, METRICS), BundleMetrics, METRICS)
    check_form(metrics.best_trial, _BestTrial, f"{METRICS}, best_trial")
    if metrics.baseline_trial is not None:
        check_form(metrics.baseline_trial, _BestTrial, f"{METRICS}, baseline_trial")
    return metrics


class _BestTrial(BaseModel):
    """What is used of a row of trials.csv."""

    trial: int
    truncation_depth: int
    frozen_depth: int
    dropout: float
    augmentation: float
    epochs: int
    balanced_accuracy: Annotated[
        float, Field(validation_alias=AliasChoices("balanced_accuracy", "best_balanced_accuracy"))
    ]
    """Under the second name in bundles of version 0.1."""


def read_test_metrics(content: bytes) -> TestMetrics | None:
    """Reads the test figures from the metrics.json of a bundle, or of a folder that `evaluate` has written.

    Returns:
        None where the search of the bundle has not ended.

    Raises:
        BundleError: it has another form than this version writes.
    """
    only: _OnlyTest = check_form(read_json(content, METRICS), _OnlyTest, METRICS)
    return only.test


@dataclass(frozen=True)
class _OnlyTest:
    test: TestMetrics | None
