"""Figures of validation and test: against their definitions, counted by hand."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn import metrics

from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.evaluation.ranking import sensitivity_at
from lungct_tune.experiment.metrics import Figure, FittedOn, TemperatureScaling
from lungct_tune.training.objective import validation_figures

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma")


def one_hot(predicted: list[int], classes: int = 4) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predicted]


def test_always_naming_the_largest_class_gains_nothing() -> None:
    labels = np.array([0] * 90 + [1] * 5 + [2] * 3 + [3] * 2)
    figures = validation_figures(labels, one_hot([0] * 100))
    assert figures["accuracy"] == 0.9
    assert figures["balanced_accuracy"] == 0.25


@pytest.mark.parametrize("seed", range(20))
def test_the_figures_that_steer_are_scikit_learns(seed: int) -> None:
    """Also where a class has no image, and where it is named all the same."""
    rng = np.random.default_rng(seed)
    labels, probabilities = rng.integers(rng.integers(1, 5), size=rng.integers(1, 60)), rng.dirichlet(np.ones(4), 60)
    probabilities = probabilities[: len(labels)]
    predicted, recall = probabilities.argmax(axis=1), metrics.recall_score
    figures = validation_figures(labels, probabilities)
    assert figures["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    balanced = recall(labels, predicted, labels=np.unique(labels), average="macro")
    assert figures["balanced_accuracy"] == pytest.approx(balanced)


def test_log_loss_weighs_classes_alike() -> None:
    labels = np.array([0] * 9 + [1])
    probabilities = np.full((10, 2), 0.5)
    probabilities[9] = [0.75, 0.25]
    expected = (np.log(2) + np.log(4)) / 2
    assert validation_figures(labels, probabilities)["log_loss"] == pytest.approx(expected)


def test_figures_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    predicted = [0, 1, 1, 1, 2, 0, 3, 3]
    majority = {"majority class": ("normal", np.full(8, 2))}
    figures = evaluate_predictions(labels, one_hot(predicted), CLASSES, np.arange(8), references=majority)
    assert (figures.n, figures.groups) == (8, 8)
    assert figures.accuracy.value == figures.balanced_accuracy.value == 0.75
    assert figures.confusion_matrix == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]]
    large = figures.per_class["large cell carcinoma"]
    assert large.n == 2 and large.sensitivity.value == 1
    assert large.specificity.value == pytest.approx(5 / 6)
    assert large.ppv.value == pytest.approx(2 / 3) and large.npv.value == 1
    assert large.auroc.value == pytest.approx((5 + 0.5) / 6)  # ranks above 5 of the 6 others, ties with one
    two = figures.cancer_vs_normal
    assert two.table == [[1, 1], [0, 6]] and (two.n_cancer, two.n_normal) == (6, 2)
    assert two.sensitivity.value == 1 and two.specificity.value == 0.5
    rule = figures.references["majority class"]
    assert rule.name == "normal" and rule.accuracy.value == 0.25 and rule.difference.value == 0.5
    assert rule.mcnemar_p == pytest.approx(2 * (1 + 6) / 2**6)  # 5 images gained, 1 lost


def test_cancer_is_what_the_cancers_together_say() -> None:
    probabilities = np.array([[0.3, 0.2, 0.4, 0.1], [0.2, 0.1, 0.6, 0.1], [0.0, 0.0, 0.9, 0.1]])
    figures = evaluate_predictions(np.array([0, 0, 2]), probabilities, CLASSES, np.arange(3))
    assert figures.confusion_matrix[0] == [0, 0, 2, 0]  # normal is the likeliest of four
    assert figures.cancer_vs_normal.table == [[1, 0], [1, 1]]  # but not likelier than not


def test_the_threshold_of_high_specificity_comes_from_elsewhere_and_both_rates_are_told() -> None:
    """On these images themselves, 95 % specificity could be had with every cancer found."""
    cancer_N = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    labels_N = np.array([0, 0, 0, 0, 2, 2, 2, 2])
    probabilities_NC = np.stack([cancer_N, 0 * cancer_N, 1 - cancer_N, 0 * cancer_N], axis=1)
    figures = evaluate_predictions(labels_N, probabilities_NC, CLASSES, np.arange(8), at_95_specificity=0.45)
    high = figures.cancer_vs_normal.at_95_specificity
    assert (high.threshold, high.sensitivity.value, high.specificity.value) == (0.45, 1.0, 0.75)
    assert figures.cancer_vs_normal.sensitivity_at_95_specificity.value == 1
    without = evaluate_predictions(labels_N, probabilities_NC, CLASSES, np.arange(8))
    assert without.cancer_vs_normal.at_95_specificity is None


def test_cancer_against_normal_is_asked_of_the_probabilities_that_a_user_gets() -> None:
    """A temperature keeps the likeliest of all classes, and may change what several classes say together."""
    plain = np.array([[0.2, 0.2, 0.4, 0.2], [0.1, 0.1, 0.7, 0.1]])
    scaling = TemperatureScaling(0.5, FittedOn(2, 2, "made up"))
    labels, scaled = np.array([0, 2]), calibrated(plain, scaling.temperature)
    figures = evaluate_predictions(labels, scaled, CLASSES, np.arange(2), uncalibrated_NC=plain, scaling=scaling)
    as_trained, as_scaled = (evaluate_predictions(labels, said, CLASSES, np.arange(2)) for said in (plain, scaled))
    assert figures.confusion_matrix == as_trained.confusion_matrix
    assert as_trained.cancer_vs_normal.table == [[1, 0], [0, 1]]
    assert figures.cancer_vs_normal.table == [[1, 0], [1, 0]]
    assert figures.calibration.before == as_trained.calibration.before
    assert figures.calibration.after == as_scaled.calibration.before


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 40), st.booleans())
def test_figures_are_scikit_learns_at_any_weights(seed: int, n: int, tied: bool) -> None:
    """A group of two copies counts as scikit-learn's sample weight of two."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    scores = rng.dirichlet(np.ones(3), n)
    scores = np.round(scores, 1) if tied else scores
    weights = rng.integers(1, 4, n)
    groups = np.repeat(np.arange(n), weights)
    labels_N, scores_NC, predicted = labels[groups], scores[groups], scores.argmax(axis=1)
    figures = evaluate_predictions(labels_N, scores_NC, ("adenocarcinoma", "benign", "normal"), groups)
    weighted: Any = {"sample_weight": weights}
    assert figures.accuracy.value == pytest.approx(metrics.accuracy_score(labels, predicted, **weighted))
    balanced = metrics.balanced_accuracy_score(labels, predicted, **weighted)
    assert figures.balanced_accuracy.value == pytest.approx(balanced)
    f1 = metrics.f1_score(labels, predicted, average="macro", **weighted)
    assert figures.macro_f1.value == pytest.approx(f1)
    assert figures.cancer_vs_normal is None  # benign is neither
    for c, of_class in enumerate(figures.per_class.values()):
        is_c, said_c, score_c = labels == c, predicted == c, scores[:, c]
        for name, function, truth, said in (
            ("sensitivity", metrics.recall_score, is_c, said_c),
            ("specificity", metrics.recall_score, ~is_c, ~said_c),
            ("ppv", metrics.precision_score, is_c, said_c),
            ("npv", metrics.precision_score, ~is_c, ~said_c),
        ):
            if said.any() or "s" in name[:1]:
                assert getattr(of_class, name).value == pytest.approx(
                    function(truth, said, zero_division=0, **weighted)
                )
            else:
                assert getattr(of_class, name) == Figure(None, None)
        assert of_class.auroc.value == pytest.approx(metrics.roc_auc_score(is_c, score_c, **weighted))
        precision = metrics.average_precision_score(is_c, score_c, **weighted)
        assert of_class.average_precision.value == pytest.approx(precision)
        false_alarms, found, _ = metrics.roc_curve(is_c, score_c, drop_intermediate=False, **weighted)
        at_95 = sensitivity_at(0.95, is_c, score_c)(weights[None].astype(float))
        assert at_95 == pytest.approx(found[false_alarms <= 0.05 + 1e-12].max())


def test_a_figure_that_the_split_does_not_define_is_none_and_json() -> None:
    figures = evaluate_predictions(np.array([0, 0]), one_hot([0, 1]), CLASSES, np.arange(2))
    assert figures.per_class["normal"].auroc == Figure(None, None)
    assert figures.per_class["adenocarcinoma"].specificity.value is None
    assert figures.cancer_vs_normal.specificity.value is None
    assert figures.confusion_matrix[2] == [0, 0, 0, 0]
    assert figures.without_overlap is None and figures.calibration.after is None
    json.dumps(asdict(figures), allow_nan=False)


def test_images_without_group_overlap_are_judged_apart() -> None:
    labels, overlap = np.array([0, 1, 2, 3]), np.array([True, True, False, False])
    rule = {"majority class": ("normal", np.full(4, 2))}
    figures = evaluate_predictions(
        labels, one_hot([0, 1, 2, 0]), CLASSES, np.arange(4), overlap_N=overlap, references=rule
    )
    assert figures.without_overlap.references["majority class"].accuracy.value == 0.5
    assert figures.accuracy.value == 0.75
    assert figures.without_overlap.n == 2 and figures.without_overlap.accuracy.value == 0.5
    assert figures.without_overlap.balanced_accuracy.value == 0.5
    assert figures.without_overlap.references["majority class"].balanced_difference.value == 0
    assert figures.without_overlap.missing == CLASSES[:2] and figures.missing == ()
    apart = evaluate_predictions(labels, one_hot([0, 1, 2, 0]), CLASSES, np.arange(4), overlap_N=overlap & False)
    assert apart.without_overlap is None


def test_images_unlike_the_training_images_are_judged_apart() -> None:
    """The half of each class; the odd image is on the other side."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    similarity = np.array([0.9, 0.2, 0.8, 0.1, 0.3, 0.6, 0.5])
    predicted = [0, 2, 0, 0, 1, 1, 3]  # wrong: the second and the last
    figures = evaluate_predictions(labels, one_hot(predicted), CLASSES, np.arange(7), similarity_N=similarity)
    assert figures.by_likeness is not None
    least, most = figures.by_likeness.least, figures.by_likeness.most
    assert (least.n, least.similarity, least.accuracy.value) == (3, 0.2, pytest.approx(2 / 3))
    assert (most.n, most.similarity, most.accuracy.value) == (4, 0.7, 0.75)
    assert (least.balanced_accuracy.value, most.balanced_accuracy.value) == (0.75, 0.75)
    single = evaluate_predictions(
        np.array([0, 0, 1]), one_hot([0, 0, 1]), CLASSES, np.arange(3), similarity_N=similarity[:3]
    )
    assert single.by_likeness is None
    assert evaluate_predictions(labels, one_hot(predicted), CLASSES, np.arange(7)).by_likeness is None


def test_macro_f1_is_no_surer_than_the_rarest_class() -> None:
    """All are right: 40 groups of three classes and 2 of the fourth."""
    labels = np.array([0, 1, 2] * 40 + [3, 3])
    rare = evaluate_predictions(labels, one_hot(list(labels)), CLASSES, np.arange(122))
    assert rare.macro_f1.value == 1 and rare.macro_f1.ci95 == pytest.approx((0.025 ** (1 / (4 * 2)), 1))
    common, fourth = (1 - 0.025 ** (1 / groups) for groups in (40, 2))
    assert rare.balanced_accuracy.ci95 == pytest.approx((1 - np.sqrt(3 * common**2 + fourth**2) / 4, 1))


def test_a_difference_in_balanced_accuracy_is_paired_and_weighs_classes_alike() -> None:
    """The model and the rule are wrong on the same images but one; each alone has a wide interval."""
    labels = np.array([0] * 80 + [1] * 40)
    rule = np.where(np.arange(120) % 3 == 0, 1 - labels, labels)
    model = rule.copy()
    model[[81, 84, 87, 90, 93]] = 1  # 5 of the 13 images of the second class that the rule has wrong
    others = {"shortcut: file": ("file", rule)}
    figures = evaluate_predictions(
        labels, one_hot(list(model), 2), ("benign", "normal"), np.arange(120), references=others
    )
    compared = figures.references["shortcut: file"]
    assert compared.difference.value == pytest.approx(5 / 120)
    assert compared.balanced_difference.value == pytest.approx(5 / 40 / 2)
    low, high = compared.balanced_difference.ci95
    assert 0 < low < compared.balanced_difference.value < high
    assert figures.balanced_accuracy.ci95[0] < compared.balanced_accuracy.value  # ends of intervals would not tell


def test_a_model_without_an_error_is_no_surer_than_its_number_of_groups() -> None:
    labels = np.array([0, 1, 2, 3] * 3)
    others = {"majority class": ("normal", np.full(12, 2)), "shortcut: file": ("file", labels)}
    figures = evaluate_predictions(labels, one_hot(list(labels)), CLASSES, np.arange(12), references=others)
    always = figures.references["majority class"].balanced_difference
    assert always.value == 0.75 and always.ci95 == (pytest.approx(0.735 - 0.25, abs=1e-3), 0.75)
    assert figures.references["shortcut: file"].balanced_difference == Figure(0.0, None)


def test_published_size_is_judged_in_seconds() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(4, size=315), rng.dirichlet(np.ones(4), 315)
    began = time.process_time()
    evaluate_predictions(labels, probabilities, CLASSES, rng.integers(200, size=315), uncalibrated_NC=probabilities)
    assert time.process_time() - began < 10


def test_the_intervals_of_all_figures_hold_what_many_patients_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model judged on 40 patients of three slices each, 25 times, and once on 20,000 patients.

    All but the calibration error's: see `calibration_errors`.
    """

    def draw(rng: np.random.Generator, patients: int) -> dict[tuple[str, ...], Any]:
        groups = np.repeat(np.arange(patients), 3)
        logits = 2 * np.eye(4)[groups % 4] + rng.normal(size=(patients, 4))[groups] + rng.normal(size=(len(groups), 4))
        return dict(leaves(asdict(evaluate_predictions(groups % 4, softmax(logits, axis=1), CLASSES, groups))))

    def leaves(figures: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, figure in figures.items():
            if isinstance(figure, dict) and "ci95" in figure:
                yield (*path, name), figure
            elif isinstance(figure, dict):
                yield from leaves(figure, (*path, name))

    with monkeypatch.context() as patched:
        patched.setattr("lungct_tune.evaluation.bootstrap.RESAMPLES", 1)
        truth = {path: figure["value"] for path, figure in draw(np.random.default_rng(0), 20_000).items()}
    assert len(truth) == 3 + 4 * 6 + 6 + 2
    held = dict.fromkeys(truth.keys() - {("calibration", "before", "ece")}, 0)
    for simulation in range(25):
        for path, figure in draw(np.random.default_rng(1 + simulation), 40).items():
            if path in held:
                held[path] += figure["ci95"][0] <= truth[path] <= figure["ci95"][1]
    assert min(held.values()) / 25 >= 0.76, min(held, key=lambda path: held[path])
    assert np.mean(list(held.values())) / 25 >= 0.93
