"""Measures the cost of one further trial: in warm slots, and in Ray's documented way to run Tune with Train.

    python benchmarks/further_trial.py

Both ways run the same small trial, one at a time on one CPU: two epochs of a ResNet50 truncated at 1 on 32-pixel
phantoms, with validation. "documented" is a Tune function trainable that starts a TorchTrainer and reports, with a
checkpoint after each epoch, through TuneReportCallback (https://docs.ray.io, "Hyperparameter Tuning with Ray Tune"). A
slot writes the weights of the best epoch when the trial ends. Each way runs with few and with more trials. The
difference is the cost of the further trials. Their time outside of epochs is the overhead.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
from ray import train, tune
from rich.console import Console
from rich.table import Table

from lungct_tune.config.search_space import SearchSpace, parse_space
from lungct_tune.data import make_phantoms, read_images, split_images
from lungct_tune.display import Display
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import finished_trials, open_study
from lungct_tune.experiment.study_journal import opened_journal
from lungct_tune.training.objective import validation_figures
from lungct_tune.tuning.cluster import connect
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.ray_trainer import scaling
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.tuner import run_search

EPOCHS = 2
SPACE = "truncation_depth: 1\naugmentation: 0\ndropout: {low: 0.0, high: 0.5}"


def plan_in(
    folder: Path, epochs: int = EPOCHS, patients: int = 20, share: Callable[[np.ndarray], Any] = ray.put
) -> SlotPlan:
    images = read_images(make_phantoms(folder, seed=0, patients=patients, size=48), 32, cache=folder, progress=False)
    split = split_images(images, "grouped", seed=0)
    return SlotPlan(
        experiment=Experiment.at(str(folder), "warm"),
        dataset=SharedDataset(
            images=share(np.ascontiguousarray(images.images_NHW)),
            rows=np.arange(len(split)),
            labels_N=images.table["label"].to_numpy(),
            classes=len(images.classes),
            backbone=None,
            normalisation="unit",
            batch_size=8,
            epochs=epochs,
        ),
        folds=(Fold(np.flatnonzero(split == "train"), np.flatnonzero(split == "valid")),),
        workers=1,
        resources_per_worker={"CPU": 1},
        mailbox=None,
    )


def search_in_one_slot(study: optuna.Study, space: SearchSpace, plan: SlotPlan, trials: int) -> None:
    with opened_mailbox(plan.experiment.name) as mailbox:
        plan = replace(plan, mailbox=mailbox)
        run_search(study, space, plan, trials=trials, slots=1, seed=0, display=Display(Console(quiet=True)))


def warm(plan: SlotPlan, space: SearchSpace, trials: int, folder: Path) -> tuple[float, float]:
    """Wall seconds and epoch seconds of a search in one slot."""
    name = f"warm-{trials}"
    with opened_journal(folder / f"{name}.journal") as storage:
        study = open_study(storage, name, space, EPOCHS, new=True)
        began = time.perf_counter()
        search_in_one_slot(study, space, replace(plan, experiment=Experiment.at(str(folder), name)), trials)
        ended = time.perf_counter()
    return ended - began, sum(trial.seconds for trial in finished_trials(study))


def documented(
    plan: SlotPlan, space: SearchSpace, trials: int, folder: Path, callbacks: Sequence[tune.Callback] = ()
) -> tuple[float, float]:
    """Wall seconds and epoch seconds of as many trials, each of which starts its own Train run."""

    def run_trial(config: dict[str, Any]) -> None:
        from ray.train.torch import TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        TorchTrainer(
            train_loop,
            train_loop_config={"plan": plan, "hyperparameters": space.hyperparameters(config)},
            scaling_config=scaling(plan.workers, plan.resources_per_worker),
            run_config=train.RunConfig(
                name=tune.get_context().get_trial_id(),
                storage_path=str(folder / "documented-train"),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item]  # of Train V2; mypy sees V1
            ),
        ).fit()

    began = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(run_trial, {"memory": 1}),
        param_space={"dropout": tune.uniform(0, 0.5)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name=f"documented-{trials}", storage_path=str(folder), verbose=0, callbacks=[*callbacks]
        ),
    ).fit()
    wall = time.perf_counter() - began
    assert not results.errors
    frames = [results[i].metrics_dataframe for i in range(len(results))]
    return wall, sum((float(frame["seconds"].sum()) for frame in frames if frame is not None), 0.0)


def train_loop(config: dict[str, Any]) -> None:
    import torch

    plan: SlotPlan = config["plan"]
    (fold,) = plan.folds
    trainer = plan.dataset.trainer(config["hyperparameters"], fold.train_rows, seed=0, device=torch.device("cpu"))
    for _ in range(plan.dataset.epochs):
        began = time.perf_counter()
        trainer.train_epoch()
        labels_N = plan.dataset.labels_of(fold.valid_rows)
        figures = validation_figures(labels_N, trainer.probabilities(plan.dataset.positions(fold.valid_rows)))
        seconds = time.perf_counter() - began
        stream = io.BytesIO()
        torch.save(trainer.state_dict(), stream)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "last.pt").write_bytes(stream.getvalue())
            train.report(figures | {"seconds": seconds}, checkpoint=train.Checkpoint.from_directory(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documented", type=int, nargs=2, default=(2, 6), metavar="N", help="few and more trials")
    parser.add_argument("--warm", type=int, nargs=2, default=(2, 402), metavar="N", help="few and more trials")
    chosen = parser.parse_args()
    connect(None, verbose=False)
    space = parse_space(SPACE, "benchmark")
    table = Table("way", "trials", "wall s", "a further trial, s", "of it in epochs", "overhead a trial, s")
    overheads = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = plan_in(Path(scratch))
        for way, (few, more) in ((documented, chosen.documented), (warm, chosen.warm)):
            (wall_few, epochs_few), (wall_more, epochs_more) = (way(plan, space, n, Path(scratch)) for n in (few, more))
            further, inside = ((b - a) / (more - few) for a, b in ((wall_few, wall_more), (epochs_few, epochs_more)))
            overheads.append(further - inside)
            cells = [f"{wall_few:.1f}, {wall_more:.1f}", f"{further:.2f}", f"{inside:.2f}", f"{further - inside:.2f}"]
            table.add_row(way.__name__, f"{few}, {more}", *cells)
    Console().print(table, f"documented / warm: {overheads[0] / overheads[1]:.0f} times")
    ray.shutdown()


if __name__ == "__main__":
    main()
