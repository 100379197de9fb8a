"""Compares a search with the two usual ways to run the same trials: a plain Optuna loop, and Ray Tune with Ray Train.

    python benchmarks/peers.py [--trials 12]

All three train the same configurations with the same `Trainer`, one trial at a time on one CPU: a ResNet50 truncated at
10 on 240 phantoms of 32 pixels, for one epoch with validation, so that no early stopping makes one way shorter. "plain"
is a loop over Optuna's ask and tell in one process: no state, no weights kept, nothing that survives a crash.
"documented" is Ray's documented way, a Tune trainable that starts a TorchTrainer (benchmarks/further_trial.py). "slot"
is a search of this project with one slot. The first trial has what happens once: processes that start, imports. So a
trial costs the seconds from the end of the first trial to the end of the last one, divided by the others' number. The
aim is that a trial of a slot takes at most 1.1 times as long as one of the plain loop.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
from further_trial import documented, plan_in, search_in_one_slot
from ray import tune
from rich.console import Console
from rich.table import Table

from lungct_tune.config.search_space import SearchSpace, parse_space
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import open_study
from lungct_tune.experiment.study_journal import opened_journal
from lungct_tune.training.objective import OBJECTIVE, validation_figures
from lungct_tune.tuning.cluster import connect
from lungct_tune.tuning.slot_plan import SlotPlan

SPACE = "truncation_depth: 10\naugmentation: 0.5\ndropout: {low: 0.0, high: 0.5}"
EPOCHS, PATIENTS = 1, 80


class Ends(tune.Callback):  # type: ignore[misc]
    """Notes when trials of Ray Tune end."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.at.append(time.time())


def plain(plan: SlotPlan, space: SearchSpace, trials: int) -> list[float]:
    """Runs the trials in this process; returns when each ended."""
    (fold,), data, ends = plan.folds, plan.dataset, []
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(trials):
        trial = study.ask(space.distributions)
        trainer = data.trainer(space.hyperparameters(trial.params), fold.train_rows, 0, torch.device("cpu"))
        for _ in range(EPOCHS):
            trainer.train_epoch()
            probabilities_NC = trainer.probabilities(data.positions(fold.valid_rows))
            figures = validation_figures(data.labels_of(fold.valid_rows), probabilities_NC)
        study.tell(trial, figures[OBJECTIVE])
        ends.append(time.time())
    return ends


def slot(plan: SlotPlan, space: SearchSpace, trials: int, folder: Path) -> list[float]:
    """Runs the trials as a search in one slot; returns when each ended."""
    with opened_journal(folder / "study.journal") as storage:
        study = open_study(storage, "slot", space, EPOCHS, new=True)
        search_in_one_slot(study, space, replace(plan, experiment=Experiment.at(str(folder), "slot")), trials)
    return sorted(trial.datetime_complete.timestamp() for trial in study.trials if trial.datetime_complete)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="trials of each way (12)")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    connect(None, verbose=False)
    space = parse_space(SPACE, "benchmark")
    table = Table("way", "wall s", "a trial from the second on, s", "relative to plain")
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plan, noted = plan_in(Path(scratch), EPOCHS, PATIENTS), Ends()
        for way in ("plain", "documented", "slot"):
            began = time.time()
            if way == "plain":
                ends = plain(plan, space, asked.trials)
            elif way == "slot":
                ends = slot(plan, space, asked.trials, Path(scratch))
            else:
                documented(plan, space, asked.trials, Path(scratch), [noted])
                ends = noted.at
            wall = time.time() - began
            seconds[way] = (ends[-1] - ends[0]) / (len(ends) - 1)
            table.add_row(way, f"{wall:.1f}", f"{seconds[way]:.2f}", f"{seconds[way] / seconds['plain']:.2f}")
    Console().print(table)
    ray.shutdown()


if __name__ == "__main__":
    main()
