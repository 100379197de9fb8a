"""A search that ships an ensemble: its figures, its bundle, and what its pages say. Its models are not trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from recorded_search import Search

from lungct_tune.auditing.audit import audit_images
from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.data.split import DataSplit
from lungct_tune.evaluation.bundle_files import BundleFiles
from lungct_tune.evaluation.calibration import calibrated
from lungct_tune.evaluation.classifier import Classifier
from lungct_tune.evaluation.exported import Exported, compare_with_bundle, export_onnx, export_torch
from lungct_tune.experiment.bundle import AUDIT, RetrainedModel, as_json, write_bundle
from lungct_tune.experiment.folder import VALID, trial_folder
from lungct_tune.experiment.results import Bundle, read_results
from lungct_tune.experiment.study import finished_trials
from lungct_tune.experiment.trial import best_trial
from lungct_tune.models.features import pooled_features
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.reporting.model_card import model_card
from lungct_tune.reporting.winner_section import winner_section

FOLDS = 2


def a_model(seed: int, of: Hyperparameters, split: DataSplit) -> RetrainedModel:
    """A network with random weights, as the workers leave one of a fold."""
    torch.manual_seed(seed)
    model = TruncatedResNet50(of.truncation_depth, classes=4, mirrored=of.mirrored)
    images = torch.from_numpy(np.array(split.images.images_NHW))
    for _ in range(3):
        forward(model, as_grey(images[torch.randperm(len(images))[:16]]), "imagenet")  # for its statistics
    model.head.get_submodule("logits").weight.data *= 20
    with torch.no_grad():
        test_NC = forward(model.eval(), as_grey(images[split.test_rows]), "imagenet").softmax(dim=1).numpy()
    kept, rows = io.BytesIO(), split.folds[seed][0]
    np.savez(kept, rows=rows, features=pooled_features(model, images, rows, "imagenet"))
    return RetrainedModel(safetensors.torch.save(model.state_dict()), test_NC, kept.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> tuple[Search, DataSplit]:
    search = Search(tmp_path_factory.mktemp("ensemble"), phantoms, trials=3)
    for _ in range(3):
        search.run()
    split = DataSplit(search.images, search.split, None).in_folds(FOLDS, 0)
    search.plan = replace(
        search.plan, settings=search.plan.settings.model_copy(update={"folds": FOLDS, "ensemble": True})
    )
    search.plan.save(split)
    return search, split


@pytest.fixture(scope="module")
def members(finished: tuple[Search, DataSplit]) -> list[RetrainedModel]:
    search, split = finished
    best = best_trial(finished_trials(search.study))
    assert best is not None
    return [a_model(seed, best.hyperparameters, split) for seed in range(FOLDS)]


@pytest.fixture(scope="module")
def final(finished: tuple[Search, DataSplit], members: list[RetrainedModel]) -> Bundle:
    """The bundle, also written."""
    search, split = finished
    best, experiment = best_trial(finished_trials(search.study)), search.plan.experiment
    assert best is not None
    valid = io.BytesIO()
    np.save(valid, np.random.default_rng(0).dirichlet(np.full(4, 0.5), len(split.validation_rows)).astype(np.float32))
    experiment.write(f"{trial_folder(best.number)}/{VALID}", valid.getvalue())
    audit = audit_images(search.images, split.parts, "grouped")
    experiment.write(AUDIT, as_json(audit.as_dict()))
    files = BundleFiles(search.plan, split, audit, search.study, slots=1)
    made = files.final(best, members, published=(best, _published(search, split)))
    write_bundle(experiment, files.files(made))
    return made


def _published(search: Search, split: DataSplit) -> list[RetrainedModel]:
    """Two models whose mean names the right class of every test image, and a wrong one after a temperature above 1."""
    labels_N = search.images.table["label"].to_numpy()[split.test_rows]
    at_label = ((0.62, 0.2, 0.09, 0.09), (1e-4, 0.36, 0.31995, 0.31995))
    return [
        RetrainedModel(b"", np.stack([np.roll(values, label) for label in labels_N]).astype(np.float32))
        for values in at_label
    ]


def _mean(members: list[RetrainedModel]) -> np.ndarray:
    """The ensemble's probabilities without temperature scaling."""
    return np.mean([model.probabilities_NC for model in members], axis=0)


def test_what_is_judged_is_the_mean_of_the_members_calibrated_probabilities(
    finished: tuple[Search, DataSplit], members: list[RetrainedModel], final: Bundle
) -> None:
    search, split = finished
    assert final.config.calibration is not None
    temperature = final.config.calibration.temperature
    assert temperature != pytest.approx(1, abs=0.05)
    mean_NC = np.mean([calibrated(model.probabilities_NC, temperature) for model in members], axis=0)
    assert final.predictions is not None and final.metrics.test is not None
    np.testing.assert_array_equal(final.predictions.probabilities_NC, mean_NC)
    labels_N = search.images.table["label"].to_numpy()[split.test_rows]
    assert final.metrics.test.accuracy.value == pytest.approx((mean_NC.argmax(axis=1) == labels_N).mean())
    before = final.metrics.test.calibration.before
    assert before.brier.value == pytest.approx(((_mean(members) - np.eye(4)[labels_N]) ** 2).sum(axis=1).mean())
    assert final.metrics.looks == 1
    assert temperature > 1.3
    assert final.metrics.test.references["published"].accuracy.value == 0, "averaged in the same way"


def test_figures_by_likeness_are_given_unless_the_patients_of_all_images_are_known(
    finished: tuple[Search, DataSplit], members: list[RetrainedModel], final: Bundle
) -> None:
    search, split = finished
    assert final.metrics.test is not None and final.metrics.test.by_likeness is None, "groups.csv has the patients"
    all_but_one_N = np.arange(len(split.split)) != split.searched_rows[0]
    images = replace(search.images, table=search.images.table.assign(is_listed=all_but_one_N))
    best = best_trial(finished_trials(search.study))
    assert best is not None
    files = BundleFiles(search.plan, replace(split, images=images), {}, search.study, slots=1)
    test = files.final(best, members).metrics.test
    assert test is not None and test.by_likeness is not None
    least, most = test.by_likeness.least, test.by_likeness.most
    assert least.n == sum(rates.n // 2 for rates in test.per_class.values()) == test.n - most.n
    assert least.similarity < most.similarity < 0.999, "a test image is not compared with itself"


def test_validation_predictions_that_a_lost_machine_has_damaged_cost_the_calibration_and_are_named(
    finished: tuple[Search, DataSplit],
    members: list[RetrainedModel],
    final: Bundle,
    caplog: pytest.LogCaptureFixture,
) -> None:
    search, split = finished
    best, experiment = best_trial(finished_trials(search.study)), search.plan.experiment
    assert best is not None
    file = f"{trial_folder(best.number)}/{VALID}"
    kept = experiment.read(file)
    assert kept
    for damaged in (b"", kept[:150]):
        experiment.write(file, damaged)
        made = BundleFiles(search.plan, split, {}, search.study, slots=1).final(best, members)
        assert made.config.calibration is made.config.operating_point is None
        assert f"{file} is missing or damaged" in caplog.text
        caplog.clear()
    experiment.write(file, kept)


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_a_search_of_one_group_has_a_bundle_that_does_not_tell_unlike_images(
    elsewhere: int, finished: tuple[Search, DataSplit], members: list[RetrainedModel]
) -> None:
    """One hospital for train and validation, and another for test. Found: it failed after the look at test."""
    search, split = finished
    group = np.where(split.split == "test", "B", "A").astype(object)
    group[split.folds[0][0][:elsewhere]] = "B"  # one image is not enough to fit anything to
    images = replace(search.images, table=search.images.table.assign(group=group))
    best = best_trial(finished_trials(search.study))
    assert best is not None
    made = BundleFiles(search.plan, replace(split, images=images), {}, search.study, slots=1).final(best, members)
    assert made.features is None and made.metrics.test is not None and made.metrics.test.groups == 1


def test_models_that_an_earlier_version_has_retrained_predict_as_they_were_evaluated(
    finished: tuple[Search, DataSplit], members: list[RetrainedModel], final: Bundle
) -> None:
    """Version 0.1 kept no features, and did not mirror the test images."""
    search, split = finished
    best = best_trial(finished_trials(search.study))
    assert best is not None
    old = [replace(member, features=None) for member in members]
    made = BundleFiles(search.plan, split, {}, search.study, slots=1).final(best, old)
    assert final.config.model.mirrored and not made.config.model.mirrored


def test_the_bundle_predicts_what_was_judged(
    finished: tuple[Search, DataSplit], members: list[RetrainedModel], final: Bundle
) -> None:
    search, split = finished
    classifier = Classifier.load(search.folder / "best", "cpu")
    test_NHW = search.images.images_NHW[split.test_rows]
    classified = classifier.classify(test_NHW)
    assert final.predictions is not None
    np.testing.assert_allclose(classified.probabilities_NC, final.predictions.probabilities_NC, atol=1e-6)
    np.testing.assert_allclose(classified.uncalibrated_NC, _mean(members), atol=1e-6)
    alone_NC = classifier.classify(test_NHW[3:4]).probabilities_NC
    np.testing.assert_array_equal(alone_NC, classified.probabilities_NC[3:4])
    assert classified.distance_N is not None and np.isfinite(classified.distance_N).all()
    maps_Nhw = classifier.heat_maps(test_NHW[:3], classified.predicted_N[:3])
    assert maps_Nhw.shape[0] == 3 and 0 <= maps_Nhw.min() <= maps_Nhw.max() <= 1


@pytest.mark.parametrize("export", [export_torch, pytest.param(export_onnx, marks=pytest.mark.long)])
def test_it_exports_as_one_graph(
    export: Callable[[Classifier], Exported], finished: tuple[Search, DataSplit], final: Bundle
) -> None:
    search, split = finished
    classifier = Classifier.load(search.folder / "best", "cpu")
    test_NHW = search.images.images_NHW[split.test_rows]
    assert compare_with_bundle(export(classifier), classifier, test_NHW, "test")["same"]


def test_the_pages_say_that_it_is_an_ensemble(finished: tuple[Search, DataSplit], final: Bundle) -> None:
    search, _ = finished
    found = read_results(search.plan.experiment)
    card, section = model_card("one", found).decode(), winner_section(found)
    assert "as an ensemble of the models of its 2 folds" in card and section is not None
    sizes = {name: (parameters, flops) for name, parameters, flops in section["stages"]}
    assert sizes["the ensemble of 2"] == tuple(2 * size for size in sizes["this network"])
    assert f"{sizes['the ensemble of 2'][0]:,} parameters" in card
