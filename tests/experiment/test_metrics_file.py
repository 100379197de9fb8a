"""metrics.json: what earlier versions wrote can be read, and is written again as it was."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import BEST, SEARCH

from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment import metrics as held
from lungct_tune.experiment.metrics import BundleMetrics, EvaluationMetrics, Figure, metrics_json, read_metrics

ARCHIVE = Path(__file__).parent / "f89f17a.tar.xz"
"""Experiments that commit f89f17a made, a finished one and one that was interrupted."""


def written_by_f89f17a(file: str) -> bytes:
    with tarfile.open(ARCHIVE) as archive:
        content = archive.extractfile(f"results/{file}")
        assert content is not None
        return content.read()


@pytest.mark.parametrize("file", ["f89f17a/best/metrics.json", "interrupted/so_far/000001/metrics.json"])
def test_figures_of_an_earlier_version_are_read_and_written_again_with_the_same_keys_and_values(file: str) -> None:
    content = written_by_f89f17a(file)
    written = metrics_json(read_metrics(content))
    assert_keeps(json.loads(content), json.loads(written))
    assert read_metrics(written) == read_metrics(content)


def assert_keeps(old: Any, new: Any) -> None:
    """What an earlier version wrote is still there; there may be more keys."""
    if isinstance(old, dict):
        assert old.keys() <= new.keys()
        for key in old:
            assert_keeps(old[key], new[key])
    else:
        assert old == new


def test_the_figures_of_an_earlier_version_are_what_they_were() -> None:
    finished = read_metrics(written_by_f89f17a("f89f17a/best/metrics.json"))
    assert finished.test is not None and finished.test.n == 12 and finished.seeds is None
    assert finished.test.accuracy == Figure(0.25, (0.0, 1.0))
    assert finished.test.per_class["normal"].npv == Figure(None, None)
    assert finished.test.references["shortcut"].name == "histogram"
    assert finished.test.calibration.reliability.before == [(0.262861005961895, 0.25, 12)]
    interrupted = read_metrics(written_by_f89f17a("interrupted/so_far/000001/metrics.json"))
    assert interrupted.test is None and interrupted.best_trial["trial"] == 1


def test_what_is_computed_is_what_is_read() -> None:
    """Also the figures without group overlap, whose key in the file is another than the field."""
    labels_N, probabilities_NC = np.arange(8) % 4, np.eye(4)[[0, 1, 2, 3, 0, 1, 3, 2]]
    test = evaluate_predictions(
        labels_N,
        probabilities_NC,
        ("adenocarcinoma", "large cell carcinoma", "normal", "squamous cell carcinoma"),
        np.arange(8),
        references={"majority class": ("normal", np.full(8, 2))},
        overlap_N=np.arange(8) < 3,
    )
    metrics = BundleMetrics("data", None, BEST, SEARCH, test, seeds=held.SeedComparison([0.5], mean=0.5, sd=0.1))
    content = metrics_json(metrics)
    assert json.loads(content)["test"]["leak_free"]["n"] == 5
    assert read_metrics(content) == metrics
    external = EvaluationMetrics("hospital", "best", {}, held.LeftOut(1, 0, 2), held.LearnedFrom(3, 4), test)
    written = json.loads(metrics_json(external))
    assert list(written) == ["data", "bundle", "map", "left_out", "learned_from", "test"]
    assert written["learned_from"] == {"same file": 3, "looks alike": 4}
