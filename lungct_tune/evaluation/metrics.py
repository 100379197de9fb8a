"""Computes all figures of a classifier from its predictions, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from lungct_tune.data.class_names import CANONICAL_CLASSES
from lungct_tune.evaluation.bootstrap import INTERVAL, ClusterBootstrap
from lungct_tune.evaluation.calibration import calibration_errors, reliability_bins
from lungct_tune.evaluation.ranking import auroc, average_precision, sensitivity_at
from lungct_tune.experiment.metrics import (
    HALF,
    ByLikeness,
    CalibrationMetrics,
    CancerMetrics,
    ClassMetrics,
    Figure,
    Likeness,
    RatesAt,
    Reference,
    ReferenceAccuracy,
    Reliability,
    TemperatureScaling,
    TestMetrics,
    WithoutOverlap,
)

NORMAL, CANCER = "normal", "cancer"
CANCERS = (CANCER, *(name for name in CANONICAL_CLASSES if name != NORMAL))
"""The classes that count as cancer when images are classified as cancer or normal."""

SPECIFICITY = 0.95
"""The specificity at which the sensitivity for cancer is also computed, to compare models at the same point."""


def evaluate_predictions(
    labels_N: np.ndarray,
    probabilities_NC: np.ndarray,
    classes: tuple[str, ...],
    groups_N: np.ndarray,
    *,
    uncalibrated_NC: np.ndarray | None = None,
    scaling: TemperatureScaling | None = None,
    references: Mapping[str, tuple[str, np.ndarray]] | None = None,
    overlap_N: np.ndarray | None = None,
    similarity_N: np.ndarray | None = None,
    threshold: float = HALF,
    at_95_specificity: float | None = None,
) -> TestMetrics:
    """Computes all figures of a model on images that it was not trained on.

    Args:
        labels_N: true classes, as indices.
        probabilities_NC: the model's calibrated probabilities, rows sum to 1.
        classes: names, in the order of the columns.
        groups_N: the group of each image; the bootstrap resamples groups, not images.
        uncalibrated_NC: the probabilities before temperature scaling; None without scaling.
        scaling: the temperature; None without scaling.
        references: by kind, other ways to predict the class of these images: a name, and the predictions (N,).
        overlap_N: bool, whether the image or one of its group was a training image; None if that is unknown.
        similarity_N: the correlation of each image with the most similar training image; None if that is unknown.
        threshold: the probability of cancer above which an image counts as cancer in the figures for cancer against
            normal. All other figures take the most probable class.
        at_95_specificity: another such threshold, at which both rates are computed too, see `OperatingPoint`.
    """
    bootstrap, predicted_N = ClusterBootstrap(groups_N), probabilities_NC.argmax(axis=1)
    right_N, others = labels_N == predicted_N, references or {}
    return TestMetrics(
        n=len(labels_N),
        groups=bootstrap.count(bootstrap.everything_N),
        interval=INTERVAL,
        accuracy=bootstrap.rate(right_N),
        balanced_accuracy=_balanced_accuracy(labels_N, predicted_N, bootstrap),
        macro_f1=_macro_f1(labels_N, predicted_N, bootstrap),
        per_class={
            name: _one_class(labels_N == c, predicted_N == c, probabilities_NC[:, c], bootstrap)
            for c, name in enumerate(classes)
        },
        cancer_vs_normal=_cancer_against_normal(
            labels_N, probabilities_NC, classes, bootstrap, threshold, at_95_specificity
        ),
        calibration=_calibration(labels_N, probabilities_NC, uncalibrated_NC, scaling, bootstrap),
        confusion_matrix=confusion_matrix(labels_N, predicted_N, labels=range(len(classes))).tolist(),
        references={
            kind: _reference(name, labels_N, predicted_N, other_N, bootstrap)
            for kind, (name, other_N) in others.items()
        },
        without_overlap=None
        if overlap_N is None or not overlap_N.any()
        else _without_overlap(labels_N, predicted_N, classes, groups_N, others, ~overlap_N),
        by_likeness=None if similarity_N is None else _by_likeness(labels_N, predicted_N, groups_N, similarity_N),
    )


def cancer_probability(probabilities_NC: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """The probability of cancer (N,): the sum of all cancers."""
    return np.asarray(probabilities_NC[..., np.isin(classes, CANCERS)].sum(axis=-1))


def are_cancer_and_normal(classes: tuple[str, ...]) -> bool:
    """Whether these classes are normal and one or more cancers, and no others."""
    return NORMAL in classes and len(classes) > 1 and set(classes) <= {NORMAL, *CANCERS}


def _of_classes(labels_N: np.ndarray) -> list[np.ndarray]:
    """For each class that has images, which they are, (N,) bool."""
    return [labels_N == c for c in np.unique(labels_N)]


def _is_fixed(predicted_N: np.ndarray, of_classes: list[np.ndarray]) -> bool:
    """Whether these are predictions of one class for images of several: a rule that looks at nothing."""
    return len(of_classes) > 1 and len(np.unique(predicted_N)) == 1


def _balanced_accuracy(labels_N: np.ndarray, predicted_N: np.ndarray, bootstrap: ClusterBootstrap) -> Figure:
    """The mean sensitivity of the classes that have images."""
    of_classes = _of_classes(labels_N)
    return bootstrap.mean_rate(labels_N == predicted_N, of_classes, is_fixed=_is_fixed(predicted_N, of_classes))


def _macro_f1(labels_N: np.ndarray, predicted_N: np.ndarray, bootstrap: ClusterBootstrap) -> Figure:
    """The mean F1 of the classes that have images or were predicted."""
    named = np.union1d(labels_N, predicted_N)
    of_class_KN, positive_KN = labels_N == named[:, None], predicted_N == named[:, None]

    def macro(weights_BN: np.ndarray) -> np.ndarray:
        f1_KB = [
            2 * (weights_BN @ (of_N & positive_N)) / (weights_BN @ of_N + weights_BN @ positive_N)
            for of_N, positive_N in zip(of_class_KN, positive_KN, strict=True)
        ]
        return np.asarray(np.mean(f1_KB, axis=0))

    return bootstrap.figure(macro, bootstrap.least_groups(_of_classes(labels_N)), is_rate=True)


def balanced_difference(
    labels_N: np.ndarray, predicted_N: np.ndarray, other_N: np.ndarray, bootstrap: ClusterBootstrap
) -> Figure:
    """The balanced accuracy of predictions minus that of others, paired by image."""
    of_classes, is_fixed = _of_classes(labels_N), _is_fixed(other_N, _of_classes(labels_N))
    return bootstrap.mean_difference(labels_N == predicted_N, labels_N == other_N, of_classes, is_fixed=is_fixed)


def _two_classes(is_N: np.ndarray, positive_N: np.ndarray, bootstrap: ClusterBootstrap) -> dict[str, Figure]:
    has_both = is_N.any() and not is_N.all()  # predictive values are 0 or 1 among images of one kind
    return {
        "sensitivity": bootstrap.rate(positive_N, is_N),
        "specificity": bootstrap.rate(~positive_N, ~is_N),
        "ppv": bootstrap.rate(is_N, positive_N & has_both),
        "npv": bootstrap.rate(~is_N, ~positive_N & has_both),
    }


def _one_class(
    is_N: np.ndarray, positive_N: np.ndarray, score_N: np.ndarray, bootstrap: ClusterBootstrap
) -> ClassMetrics:
    of_class, others = bootstrap.effective(is_N), bootstrap.effective(~is_N)
    return ClassMetrics(
        n=int(is_N.sum()),
        **_two_classes(is_N, positive_N, bootstrap),
        auroc=bootstrap.figure(auroc(is_N, score_N), min(of_class, others), is_rate=True),
        average_precision=Figure(None, None)
        if is_N.all()  # it is 1 whatever the model says
        else bootstrap.figure(average_precision(is_N, score_N), of_class, is_rate=True),
    )


def _cancer_against_normal(
    labels_N: np.ndarray,
    probabilities_NC: np.ndarray,
    classes: tuple[str, ...],
    bootstrap: ClusterBootstrap,
    threshold: float,
    at_95_specificity: float | None,
) -> CancerMetrics | None:
    """Figures for cancer against normal. Cancer is predicted if the cancers' probability is above the threshold.

    The probabilities are calibrated, as a bundle gives them. Temperature scaling may change this prediction, though it
    never changes the most probable of all classes of a single network (see `calibrated`).
    """
    if not are_cancer_and_normal(classes):
        return None
    score_N = cancer_probability(probabilities_NC, classes)
    is_N, positive_N = labels_N != classes.index(NORMAL), score_N > threshold
    fewest = min(bootstrap.effective(is_N), bootstrap.effective(~is_N))
    return CancerMetrics(
        n_cancer=int(is_N.sum()),
        n_normal=int((~is_N).sum()),
        table=confusion_matrix(is_N, positive_N, labels=[False, True]).tolist(),
        **_two_classes(is_N, positive_N, bootstrap),
        auroc=bootstrap.figure(auroc(is_N, score_N), fewest, is_rate=True),
        sensitivity_at_95_specificity=bootstrap.figure(
            sensitivity_at(SPECIFICITY, is_N, score_N), fewest, is_rate=True
        ),
        threshold=threshold,
        at_95_specificity=None
        if at_95_specificity is None
        else RatesAt(
            at_95_specificity,
            bootstrap.rate(score_N > at_95_specificity, is_N),
            bootstrap.rate(score_N <= at_95_specificity, ~is_N),
        ),
    )


def _calibration(
    labels_N: np.ndarray,
    probabilities_NC: np.ndarray,
    uncalibrated_NC: np.ndarray | None,
    scaling: TemperatureScaling | None,
    bootstrap: ClusterBootstrap,
) -> CalibrationMetrics:
    before_NC = probabilities_NC if uncalibrated_NC is None else uncalibrated_NC
    after_NC = None if uncalibrated_NC is None else probabilities_NC
    return CalibrationMetrics(
        temperature=scaling.temperature if scaling else None,
        fitted_on=scaling.fitted_on if scaling else None,
        before=calibration_errors(labels_N, before_NC, bootstrap),
        after=None if after_NC is None else calibration_errors(labels_N, after_NC, bootstrap),
        reliability=Reliability(
            before=reliability_bins(labels_N, before_NC),
            after=None if after_NC is None else reliability_bins(labels_N, after_NC),
        ),
    )


def _without_overlap(
    labels_N: np.ndarray,
    predicted_N: np.ndarray,
    classes: tuple[str, ...],
    groups_N: np.ndarray,
    others: Mapping[str, tuple[str, np.ndarray]],
    new_N: np.ndarray,
) -> WithoutOverlap:
    """The figures on the images that are new to the model, with a bootstrap of their groups alone."""
    missing = tuple(name for c, name in enumerate(classes) if not (labels_N[new_N] == c).any())
    n = int(new_N.sum())
    if n == 0:
        nothing = Figure(None, None)
        return WithoutOverlap(
            0,
            nothing,
            {kind: ReferenceAccuracy(name, nothing) for kind, (name, _) in others.items()},
            missing=missing,
        )
    labels_N, predicted_N, bootstrap = labels_N[new_N], predicted_N[new_N], ClusterBootstrap(groups_N[new_N])
    return WithoutOverlap(
        n=n,
        accuracy=bootstrap.rate(labels_N == predicted_N),
        references={
            kind: ReferenceAccuracy(
                name,
                bootstrap.rate(labels_N == other_N[new_N]),
                balanced_difference(labels_N, predicted_N, other_N[new_N], bootstrap),
            )
            for kind, (name, other_N) in others.items()
        },
        balanced_accuracy=_balanced_accuracy(labels_N, predicted_N, bootstrap),
        missing=missing,
    )


def _by_likeness(
    labels_N: np.ndarray, predicted_N: np.ndarray, groups_N: np.ndarray, similarity_N: np.ndarray
) -> ByLikeness | None:
    """The figures on the half of each class that looks least like the training images, and on the other half."""
    is_least_N, classes = np.zeros(len(labels_N), dtype=bool), np.unique(labels_N)
    for c in classes:
        of_class = np.flatnonzero(labels_N == c)
        by_similarity = of_class[np.argsort(similarity_N[of_class], kind="stable")]
        is_least_N[by_similarity[: len(of_class) // 2]] = True
    if len(np.unique(labels_N[is_least_N])) < len(classes):
        return None

    def half(chosen_N: np.ndarray) -> Likeness:
        labels_n, predicted_n = labels_N[chosen_N], predicted_N[chosen_N]
        bootstrap = ClusterBootstrap(groups_N[chosen_N])
        return Likeness(
            n=len(labels_n),
            similarity=float(np.median(similarity_N[chosen_N])),
            accuracy=bootstrap.rate(labels_n == predicted_n),
            balanced_accuracy=_balanced_accuracy(labels_n, predicted_n, bootstrap),
        )

    return ByLikeness(half(is_least_N), half(~is_least_N))


def _reference(
    name: str, labels_N: np.ndarray, predicted_N: np.ndarray, other_N: np.ndarray, bootstrap: ClusterBootstrap
) -> Reference:
    """Figures of other predictions on the same images, and the model's difference to them."""
    right_N, others_N = labels_N == predicted_N, labels_N == other_N
    return Reference(
        name=name,
        accuracy=bootstrap.rate(others_N),
        balanced_accuracy=_balanced_accuracy(labels_N, other_N, bootstrap),
        difference=bootstrap.mean_difference(right_N, others_N, [bootstrap.everything_N]),
        balanced_difference=balanced_difference(labels_N, predicted_N, other_N, bootstrap),
        mcnemar_p=mcnemar(right_N, others_N)[2],
    )


def mcnemar(right_N: np.ndarray, others_N: np.ndarray) -> tuple[int, int, float]:
    """The exact two-sided test on the images on which only one of two models is right (McNemar 1947).

    It assumes independent images. If groups have several images, use the interval of the difference instead.

    Args:
        right_N, others_N: bool, where the first and where the other model is right.

    Returns:
        On how many images only the first is right, on how many only the other, and p.
    """
    gained, lost = int((right_N & ~others_N).sum()), int((~right_N & others_N).sum())
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
