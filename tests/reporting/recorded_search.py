"""A search whose figures are computed instead of trained, for tests that only read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from lungct_tune.auditing.audit import audit_images
from lungct_tune.auditing.shortcuts import most_similar
from lungct_tune.config.settings import Settings
from lungct_tune.data import group_overlap, read_images, split_images
from lungct_tune.data.split import DataSplit
from lungct_tune.evaluation.bundle_files import describe_model
from lungct_tune.evaluation.metrics import evaluate_predictions
from lungct_tune.experiment import bundle
from lungct_tune.experiment.metrics import BundleMetrics
from lungct_tune.experiment.plan import Plan, plan_search
from lungct_tune.experiment.predictions import Predictions
from lungct_tune.experiment.results import Bundle, SearchResults
from lungct_tune.experiment.study import finished_trials, open_study, search_cost
from lungct_tune.experiment.study_journal import StudyStorage
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, best_trial
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.tuning import searcher as studies
from lungct_tune.tuning.slots import REPORT

SPACE = """
truncation_depth: {low: 1, high: 8}
dropout: [0.2, 0.5]
backbone_lr: {low: 1e-4, high: 1e-2, log: true}
fixed_trials: [{truncation_depth: 4}]
"""


EPOCHS = 3


class Search:
    """A search on phantoms in a folder of its own, with figures that are computed instead of trained."""

    def __init__(self, folder: Path, data: Path, trials: int) -> None:
        (folder / "space.yaml").write_text(SPACE)
        settings = Settings(
            data=data,
            space=folder / "space.yaml",
            trials=trials,
            epochs=EPOCHS,
            image_size=32,
            weights="none",
            storage=str(folder),
            name="one",
        )
        self.plan: Plan = plan_search(settings, set())
        self.images = read_images(data, 32, progress=False)
        self.split = split_images(self.images, "grouped", 0)
        self.plan.save(DataSplit(self.images, self.split, None))
        self.storage = StudyStorage(Path(self.plan.study_url))
        self.study = open_study(self.storage, "one", self.plan.space, EPOCHS, new=True)
        self._tune = studies.OptunaSearcher(
            self.study,
            self.plan.space,
            self.plan.experiment,
            epochs=EPOCHS,
            seed=0,
            startup=3,
            storage_threads=ThreadPoolExecutor(1),
        )

    @property
    def folder(self) -> Path:
        return Path(self.plan.experiment.uri)

    def run(self, epochs: int = EPOCHS, failure: str = "") -> None:
        """One trial: to its end, left after some epochs, or failing after them."""
        name = f"ray-{len(self.study.trials)}"
        number = self._tune.suggest(name)["order"].number
        for epoch in range(1, epochs + 1):
            reached = 0.3 + 0.1 * epoch + 0.01 * number
            figures = EpochFigures(
                epoch=epoch,
                balanced_accuracy=reached,
                accuracy=reached,
                log_loss=1 / reached,
                train_loss=1.0,
                train_s=2.0,
                valid_s=0.5,
                slot=1 + number % 2,
                at=1.8e9 + 10 * number + 3 * epoch,
            )
            if epoch == EPOCHS and not failure:
                self._tune.on_trial_complete(name, {REPORT: EpochReport(Outcome.COMPLETED, (figures,))})
            else:
                self._tune.record(name, EpochReport(Outcome.RUNNING, (figures,)))
        if failure:
            self._tune.on_trial_complete(name, {REPORT: EpochReport(Outcome.FAILED, reason=failure)})
            self._tune.tell_failed()
        self.storage.sync()

    def finish(self) -> None:
        """The bundle, of the best trial's configuration with random weights."""
        best = best_trial(finished_trials(self.study))
        assert best is not None
        torch.manual_seed(0)
        of = best.hyperparameters
        model = TruncatedResNet50(of.truncation_depth, classes=4, mirrored=of.mirrored).eval()
        test = np.flatnonzero(self.split == "test")
        grey_N1HW = as_grey(torch.from_numpy(np.array(self.images.images_NHW[test])))
        with torch.no_grad():
            probabilities_NC = forward(model, grey_N1HW, "imagenet").softmax(dim=1).numpy()
        labels_N, groups_N = (self.images.table[column].to_numpy()[test] for column in ("label", "group"))
        figures = evaluate_predictions(
            labels_N,
            probabilities_NC,
            self.images.classes,
            groups_N,
            references={"majority class": (self.images.classes[0], np.zeros(len(test), dtype=int))},
            overlap_N=group_overlap(self.images, self.split),
            similarity_N=most_similar(self.images, test, np.flatnonzero(self.split != "test"))[0],
        )
        paths_N = self.images.table["path"].to_numpy()[test]
        cost = search_cost(self.study, finished_trials(self.study), slots=1)
        made = Bundle(
            weights=safetensors.torch.save(model.state_dict()),
            config=describe_model(self.plan.settings, self.images, of, EPOCHS, None),
            metrics=BundleMetrics("phantoms", None, best.row(), cost, test=figures),
            predictions=Predictions(self.images.classes, paths_N, labels_N, probabilities_NC, groups_N),
        )
        bundle.write_bundle(self.plan.experiment, made.files)
        audit = audit_images(self.images, self.split, "grouped")
        self.plan.experiment.write(bundle.AUDIT, bundle.as_json(audit.as_dict()))


def with_test(found: SearchResults, **more: Any) -> SearchResults:
    """The results with other test figures."""
    assert found.bundle is not None and found.test is not None
    metrics = replace(found.bundle.metrics, test=replace(found.test, **more))
    return replace(found, bundle=replace(found.bundle, metrics=metrics))


def finished_search(folder: Path, phantoms: Path) -> Search:
    """5 trials: four that completed, one that failed; 16 of 60 images are test."""
    search = Search(folder, phantoms, trials=5)
    for _ in range(3):
        search.run()
    search.run(epochs=1, failure="a <slot> died")
    search.run()
    search.finish()
    return search
