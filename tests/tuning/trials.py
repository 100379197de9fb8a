"""Small trials for tests: 60 phantom images of 32 pixels, a shallow network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.forecast import Workload
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder, TrialRecord
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.trial_runner import TrialRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHALLOW = Hyperparameters(truncation_depth=4, backbone_lr=1e-3)


def slot_plan(
    folder: Path,
    phantoms: Path,
    *,
    epochs: int,
    folds: int = 1,
    workers: int = 1,
    name: str = "one",
    mailbox: Any = None,
) -> SlotPlan:
    """A plan whose trials pause after each epoch, and keep a state of each. The workers of a slot share one CPU."""
    from lungct_tune.data import fold_images, read_images, split_images

    images = read_images(phantoms, 32, progress=False)
    split = split_images(images, "grouped", seed=0)
    searched = np.flatnonzero(split != "test")
    fold_N = fold_images(images, searched, folds, seed=0) if folds > 1 else (split[searched] != "valid").astype(int)
    return SlotPlan(
        experiment=Experiment.at(str(folder), name),
        dataset=SharedDataset(
            images=np.ascontiguousarray(images.images_NHW),
            rows=np.arange(len(split)),
            labels_N=images.table["label"].to_numpy(),
            classes=len(images.classes),
            backbone=None,
            normalisation="unit",
            batch_size=8,
            epochs=epochs,
        ),
        folds=tuple(Fold(searched[fold_N != k], searched[fold_N == k]) for k in range(folds)),
        workers=workers,
        resources_per_worker={"CPU": 1 / workers},
        mailbox=mailbox,
        rungs=tuple(range(1, epochs)),
        checkpoint_interval=0,
    )


def workload(trials: int, epochs: int, rungs: tuple[int, ...], slots: int = 1, **more: Any) -> Workload:
    """The work of a search on five images, with room to start its first retraining early."""
    return Workload(trials, epochs, rungs, slots, 4, 1, 5, 0, batch_size=1, cpus=2, final_slots=slots, **more)


def record(
    number: int, epochs: int, score: float = 0.5, outcome: Outcome = Outcome.STOPPED, ended: str = ""
) -> TrialRecord:
    """A trial of the published configuration after so many epochs, of two seconds each."""
    history = tuple(EpochFigures(epoch, score, score, 1.0, 1.0, 2.0, 0.0) for epoch in range(1, epochs + 1))
    return TrialRecord(number, PUBLISHED, history, outcome, ended or outcome.value)


def order(number: int, hyperparameters: Hyperparameters = SHALLOW, seed: int = 3) -> TrialOrder:
    return TrialOrder(number, seed, hyperparameters)


def runner(plan: SlotPlan, of: TrialOrder, *, warn: Callable[[str], None] = print, **changes: Any) -> TrialRunner:
    """The trial on this process's worker, as in slot 2."""
    import torch

    return TrialRunner(replace(plan, **changes), of, torch.device("cpu"), 2, warn)


def run_all(trial: TrialRunner) -> list[EpochReport]:
    """The reports of all steps until the trial ends."""
    reports = [trial.run()]
    while not reports[-1].is_last:
        reports.append(trial.run())
    return reports


def epochs_of(reports: list[EpochReport]) -> list[EpochFigures]:
    return [figures for report in reports for figures in report.epochs]


def comparable(figures: EpochFigures) -> EpochFigures:
    """Without what depends on time and place."""
    return replace(figures, train_s=0, valid_s=0, at=None, slot=None)
