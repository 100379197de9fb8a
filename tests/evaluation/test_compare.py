"""Models compared on the same test images: what is found, and when there is nothing to compare."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_here
from s3 import put
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lungct_tune.compare import main
from lungct_tune.evaluation.comparison import Comparison, compare_models, read_judged
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment.bundle import METRICS, PREDICTIONS
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.metrics import BundleMetrics, metrics_json
from lungct_tune.experiment.predictions import Predictions

run = partial(run_here, main)

CLASSES = ("adenocarcinoma", "large cell carcinoma", "normal")
N = 90
LABELS = np.arange(N) % 3
GROUPS = np.arange(N) // 3


def model(right: float, seed: int) -> Predictions:
    """Predictions of which about this share is right."""
    rng = np.random.default_rng(seed)
    said_N = np.where(rng.random(N) < right, LABELS, rng.integers(0, 3, N))
    probabilities_NC = 0.2 * rng.dirichlet(np.ones(3), N) + 0.8 * np.eye(3)[said_N]
    return Predictions(CLASSES, np.array([f"{i:03d}.png" for i in range(N)]), LABELS, probabilities_NC, GROUPS)


def written(folder: Path, predictions: Predictions, threshold: float = 0.5) -> Path:
    folder.mkdir()
    figures = evaluate_predictions(
        predictions.labels_N,
        predictions.probabilities_NC,
        predictions.classes,
        predictions.groups_N,
        threshold=threshold,
    )
    (folder / METRICS).write_bytes(metrics_json(BundleMetrics("made up", None, {}, {}, figures)))
    (folder / PREDICTIONS).write_bytes(predictions.as_csv())
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return written(tmp_path / "good", model(0.95, 1), threshold=0.3)


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    return written(tmp_path / "poor", model(0.4, 2))


def compared(*folders: Path) -> list[Comparison]:
    return compare_models([read_judged(str(folder), Experiment(str(folder))) for folder in folders])


def test_differences_are_those_of_the_figures(good: Path, poor: Path) -> None:
    (one,) = compared(poor, good)
    better, worse = model(0.95, 1), model(0.4, 2)
    right_N, other_N = better.predicted_N == LABELS, worse.predicted_N == LABELS
    is_N, scores = LABELS != 2, [1 - p.probabilities_NC[:, 2] for p in (better, worse)]
    expected = {
        "accuracy": right_N.mean() - other_N.mean(),
        "balanced accuracy": balanced_accuracy_score(LABELS, better.predicted_N)
        - balanced_accuracy_score(LABELS, worse.predicted_N),
        "sensitivity for cancer": (scores[0] > 0.3)[is_N].mean() - (scores[1] > 0.5)[is_N].mean(),
        "specificity for cancer": (scores[0] <= 0.3)[~is_N].mean() - (scores[1] <= 0.5)[~is_N].mean(),
        "AUROC of cancer": roc_auc_score(is_N, scores[0]) - roc_auc_score(is_N, scores[1]),
    }
    assert {name: pytest.approx(f.value) for name, f in one.differences.items()} == expected
    assert (one.gained, one.lost) == ((right_N & ~other_N).sum(), (~right_N & other_N).sum())
    assert one.mcnemar_p == pytest.approx(binomtest(one.gained, one.gained + one.lost).pvalue)
    interval = one.differences["accuracy"].ci95
    assert interval is not None and 0 < interval[0] < expected["accuracy"] < interval[1]
    (back,) = compared(good, poor)
    assert back.differences["accuracy"].value == pytest.approx(-expected["accuracy"])


def test_a_model_without_an_error_is_no_surer_of_its_gain_than_in_the_report(good: Path, tmp_path: Path) -> None:
    right = model(0.95, 1)
    perfect = replace(right, probabilities_NC=np.eye(len(CLASSES))[LABELS])
    (gain,), (loss,) = (compared(*folders) for folders in _both_orders(good, written(tmp_path / "perfect", perfect)))
    figures = evaluate_predictions(
        LABELS, perfect.probabilities_NC, CLASSES, right.groups_N, references={"other": ("", right.predicted_N)}
    )
    assert gain.differences["balanced accuracy"] == figures.references["other"].balanced_difference
    (low, high), (other_low, other_high) = (c.differences["balanced accuracy"].ci95 or () for c in (gain, loss))
    assert (low, high) == pytest.approx((-other_high, -other_low)) and low < 0
    for name in ("accuracy", "sensitivity for cancer"):  # resamples have errors of the other model alone
        gained = gain.differences[name]
        assert gained.value is not None and gained.ci95 is not None
        assert gained.ci95[0] < gained.value - (1 - 0.025 ** (1 / len(np.unique(GROUPS)))), name


def _both_orders(one: Path, other: Path) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    return (one, other), (other, one)


def test_the_same_model_is_no_better_than_itself(good: Path, tmp_path: Path) -> None:
    again = written(tmp_path / "again", model(0.95, 1), threshold=0.3)
    (one,) = compared(good, again)
    assert all(figure.value == 0 for figure in one.differences.values()) and one.mcnemar_p == 1
    status, said, _ = run(good, again)
    assert status == 0 and "not shown to be more or less accurate" in said


def test_a_model_that_was_trained_on_groups_of_the_test_images_is_named(good: Path, tmp_path: Path) -> None:
    p = model(0.4, 2)
    figures = evaluate_predictions(LABELS, p.probabilities_NC, CLASSES, GROUPS, overlap_N=GROUPS < 4)
    leaking = written(tmp_path / "leaking", p)
    (leaking / METRICS).write_bytes(metrics_json(BundleMetrics("made up", None, {}, {}, figures)))
    status, said, _ = run(good, leaking, "--html", page := tmp_path / "compared.html")
    warning = f"{leaking} was trained on images of the groups of 12 of the 90 test images: its figures are too high."
    assert status == 0 and warning in said and warning in page.read_text()
    assert f"{good} was trained" not in said


def test_rows_are_paired_by_path(good: Path, poor: Path, tmp_path: Path) -> None:
    backwards, p = slice(None, None, -1), model(0.4, 2)
    turned = Predictions(
        CLASSES, p.paths_N[backwards], p.labels_N[backwards], p.probabilities_NC[backwards], p.groups_N[backwards]
    )
    (one,), (other,) = compared(good, poor), compared(good, written(tmp_path / "turned", turned))
    assert replace(one, name="") == replace(other, name="")


def test_the_table_and_the_page_say_the_same(good: Path, poor: Path, tmp_path: Path) -> None:
    page = tmp_path / "compared.html"
    status, said, complained = run(poor, good, "--html", page)
    assert status == 0, complained
    text, (one,) = page.read_text(), compared(poor, good)
    difference = one.differences["accuracy"].value
    assert difference is not None
    for shown in (f"{good} is shown to be more accurate than {poor}", "AUROC of cancer", f"{100 * difference:+.1f}"):
        assert shown in said and shown in text
    assert run(poor, good, "--html", page)[0] == 0, "an own page is written again"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"paths_N": np.array([f"{i + 1:03d}.png" for i in range(N)])}, "their test images differ. 2 images"),
        ({"labels_N": (LABELS + 1) % 3}, "the true class of 90 images differs, such as 000.png"),
        ({"classes": ("adenocarcinoma", "benign", "normal")}, "their classes are adenocarcinoma, large cell"),
    ],
)
def test_models_of_other_images_are_not_compared(change: dict[str, Any], says: str, good: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", replace(model(0.5, 3), **change))
    status, _, complained = run(good, other)
    assert status == 2 and "cannot be compared" in complained and says in complained


def test_what_has_no_test_figures_is_refused(good: Path, tmp_path: Path) -> None:
    assert "has no metrics.json; give the bundle of a search that has ended" in run(good, tmp_path)[2]
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / METRICS).write_text('{"test": null}')
    (tmp_path / "early" / PREDICTIONS).write_text("path")
    assert "its search has not ended" in run(good, tmp_path / "early")[2]


def test_bundles_are_verified(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    assert run(bundle, tmp_path / "bundle")[0] == 0
    (tmp_path / "bundle" / PREDICTIONS).write_bytes(b"path")
    status, _, complained = run(bundle, tmp_path / "bundle")
    assert status == 2 and f"{tmp_path}/bundle/{PREDICTIONS}: not the file that was written" in complained


def test_models_may_be_at_uris(bundle: Path, s3: object) -> None:
    for file in bundle.iterdir():
        put(f"bucket/compared/best/{file.name}", file.read_bytes())
    status, said, complained = run(f"file://{bundle}", "s3://bucket/compared/best", bundle)
    assert status == 0, complained
    for one in ("s3://bucket/compared/best", bundle):
        assert f"{one} is not shown to be more or less accurate than file://{bundle}" in said.replace("\n", " ")
    put(f"bucket/compared/best/{PREDICTIONS}", b"path")
    status, _, complained = run(bundle, "s3://bucket/compared/best")
    assert status == 2 and f"s3://bucket/compared/best/{PREDICTIONS}: not the file that was written" in complained
    assert "s3://bucket/nothing has no metrics.json" in run(bundle, "s3://bucket/nothing")[2]
