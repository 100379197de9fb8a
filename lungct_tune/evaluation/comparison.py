"""Compares models on the same test images: paired differences with grouped intervals, and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lungct_tune.errors import UserError
from lungct_tune.evaluation.bootstrap import ClusterBootstrap
from lungct_tune.evaluation.metrics import (
    NORMAL,
    are_cancer_and_normal,
    balanced_difference,
    cancer_probability,
    mcnemar,
)
from lungct_tune.evaluation.ranking import auroc
from lungct_tune.experiment.bundle import CHECKSUMS, METRICS, PREDICTIONS, check_sums
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import HALF, Figure, TestMetrics, read_test_metrics
from lungct_tune.experiment.predictions import Predictions, read_predictions

DIFFERENCES = ("accuracy", "balanced accuracy", "sensitivity for cancer", "specificity for cancer", "AUROC of cancer")


@dataclass(frozen=True, eq=False)
class Judged:
    """A model's predictions and figures on test images: a bundle, or what `lungct_tune.evaluate` has written."""

    name: str
    predictions: Predictions
    """In the order of the images' paths."""
    metrics: TestMetrics

    @property
    def right_N(self) -> np.ndarray:
        """Bool."""
        return np.asarray(self.predictions.predicted_N == self.predictions.labels_N)

    @property
    def threshold(self) -> float:
        """The operating point."""
        two = self.metrics.cancer_vs_normal
        return two.threshold if two else HALF


@dataclass(frozen=True)
class Comparison:
    """A model compared with the first."""

    name: str
    differences: dict[str, Figure]
    """Its figure minus that of the first model, by the names in `DIFFERENCES`; those of cancer only where the classes
    are normal and cancers."""
    gained: int
    """Images on which only this model is right."""
    lost: int
    """Images on which only the first model is right."""
    mcnemar_p: float
    """McNemar's exact two-sided test (1947) on these images. It assumes that images are independent."""


def read_judged(name: str, folder: Experiment) -> Judged:
    """Reads a bundle, or a folder that `lungct_tune.evaluate` has written. The two files of a bundle are verified.

    Args:
        name: what the model is called.
        folder: the bundle's own folder, or the one that was written.

    Raises:
        UserError: it has no test predictions.
        BundleError: its metrics.json or its predictions.csv is altered, or cannot be read.
        StorageError: the storage refuses.
    """
    figures, rows, listing = (folder.read(file) for file in (METRICS, PREDICTIONS, CHECKSUMS))
    if listing is not None:  # a bundle; what evaluate writes has no checksums
        check_sums(folder.uri, listing, {METRICS: figures, PREDICTIONS: rows})
    if figures is None or rows is None:
        raise UserError(
            f"{name} has no {METRICS if figures is None else PREDICTIONS}{folder.similar()}; give the bundle of a "
            "search that has ended (results/NAME/best), a folder that lungct_tune.evaluate has written, or the folder "
            "of a search (results/NAME)"
        )
    metrics = read_test_metrics(figures)
    if metrics is None:
        raise UserError(f"{name} has no test figures: its search has not ended")
    return judged_model(name, read_predictions(rows, list(metrics.per_class)), metrics)


def judged_model(name: str, unordered: Predictions, metrics: TestMetrics) -> Judged:
    """A model's predictions, sorted by path."""
    order = np.argsort(unordered.paths_N, kind="stable")
    columns = ("paths_N", "labels_N", "probabilities_NC", "groups_N")
    ordered = {column: getattr(unordered, column)[order] for column in columns}
    return Judged(name, replace(unordered, **ordered), metrics)


def check_same_images(judged: Sequence[Judged]) -> None:
    """Checks that all models were judged on the same images with the same true classes.

    Raises:
        UserError: they were not; the message says what differs.
    """
    first = judged[0]
    for other in judged[1:]:
        ours, theirs = first.predictions, other.predictions
        between = f"{first.name} and {other.name} cannot be compared:"
        if ours.classes != theirs.classes:
            raise UserError(f"{between} their classes are {', '.join(ours.classes)} and {', '.join(theirs.classes)}")
        if set(ours.paths_N) != set(theirs.paths_N):
            only = sorted(set(ours.paths_N) ^ set(theirs.paths_N))
            raise UserError(
                f"{between} their test images differ. {len(only)} images are in one of them only, such as {only[0]}. "
                "Searches of the same images have the same test images if --split and --split-seed are the same. To "
                "judge models on the same images, use lungct_tune.evaluate, and compare the folders that it writes"
            )
        if (differ := ours.labels_N != theirs.labels_N).any():
            path = ours.paths_N[differ][0]
            raise UserError(f"{between} the true class of {int(differ.sum())} images differs, such as {path}")


def compare_models(judged: Sequence[Judged]) -> list[Comparison]:
    """Compares each model with the first, paired by image.

    The groups of the bootstrap are those of the first model's search.

    Raises:
        UserError: the test images differ.
    """
    check_same_images(judged)
    first, *others = judged
    bootstrap = ClusterBootstrap(first.predictions.groups_N)
    return [_compare(first, other, bootstrap) for other in others]


def _compare(first: Judged, other: Judged, bootstrap: ClusterBootstrap) -> Comparison:
    ours, theirs = first.predictions, other.predictions
    gained, lost, p = mcnemar(other.right_N, first.right_N)
    differences = [
        bootstrap.mean_difference(other.right_N, first.right_N, [bootstrap.everything_N]),
        balanced_difference(ours.labels_N, theirs.predicted_N, ours.predicted_N, bootstrap),
    ]
    if are_cancer_and_normal(ours.classes):
        is_N = ours.labels_N != ours.classes.index(NORMAL)
        (score_N, positive_N), (first_score_N, first_positive_N) = map(_of_cancer, (other, first))
        ranked, first_ranked = auroc(is_N, score_N), auroc(is_N, first_score_N)
        differences += [
            bootstrap.mean_difference(positive_N, first_positive_N, [is_N]),
            bootstrap.mean_difference(~positive_N, ~first_positive_N, [~is_N]),
            bootstrap.figure(
                lambda weights_BN: ranked(weights_BN) - first_ranked(weights_BN),
                min(bootstrap.effective(is_N), bootstrap.effective(~is_N)),
                within=(-1, 1),
            ),
        ]
    return Comparison(
        name=other.name,
        differences=dict(zip(DIFFERENCES, differences, strict=False)),
        gained=gained,
        lost=lost,
        mcnemar_p=p,
    )


def _of_cancer(judged: Judged) -> tuple[np.ndarray, np.ndarray]:
    """The probability of cancer, and whether it is above the model's operating point."""
    score_N = cancer_probability(judged.predictions.probabilities_NC, judged.predictions.classes)
    return score_N, score_N > judged.threshold
