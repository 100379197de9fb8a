"""Measures whether the driver of a search keeps up with many slots, over thousands of trials.

    python benchmarks/search_scale.py                              2,000 trials of one second in 16 slots, 3 minutes
    python benchmarks/search_scale.py --trials 10000               the whole; 11 minutes
    python benchmarks/search_scale.py --slots 64 --trials 2000 --epochs 30 --epoch-seconds 0.1 --asha

The search is a real one: Ray Tune, the study, the searcher, early stopping, TensorBoard and the other callbacks. Only
the slots are light: they sleep for the time of their epochs and answer with computed figures, as real ones do, at the
next rung or after about a second. So wall time beside the ideal, and the share of time in which slots are busy, are
those of the driver. Beside it:

- "tune alone": Ray Tune with as many trials of the same length, without a study, a searcher or callbacks;
- "before": the study as at commit f89f17a, a SQLite database that is written several times an epoch and read as a
  whole at each trial's end, and Tune's own files. It is slow, so with fewer trials (`--before`).

With `--asha` most trials are stopped early, else none. Only processes that this script starts are counted: the driver's
CPU seconds are its own, for each of the first and the last thousand trials (or of a quarter, in a short run).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import ray
from ray import tune
from ray.tune.search import Searcher
from rich.console import Console
from rich.table import Table

from lungct_tune.config.search_space import SearchSpace, parse_space, read_space
from lungct_tune.display import Display
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import finished_trials, open_study, rungs
from lungct_tune.experiment.study_journal import opened_journal
from lungct_tune.experiment.trial import EpochCost, EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning import tuner
from lungct_tune.tuning.cluster import connect
from lungct_tune.tuning.fold_model import Fold
from lungct_tune.tuning.mailbox import opened_mailbox
from lungct_tune.tuning.shared_data import SharedDataset
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.slots import ON_HEAD, ORDER, REPORT
from lungct_tune.tuning.tally import SearchTally

SPACE = Path(__file__).parents[1] / "search_spaces" / "default.yaml"

STEP_S = 1.0
"""A slot answers after about this time, or at a rung."""


@dataclass
class Load:
    """What the slots pretend."""

    trials: int
    slots: int
    epochs: int
    epoch_s: float
    asha: bool


@dataclass
class Progress:
    """When trials ended, and the driver's CPU seconds until then."""

    at: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def note(self) -> None:
        self.at.append(time.perf_counter())
        self.cpu.append(time.process_time())


class LightSlot(tune.Trainable):  # type: ignore[misc]
    """A slot that sleeps instead of training."""

    load: Load

    def setup(self, config: dict[str, Any], plan: SlotPlan) -> None:  # type: ignore[override]
        self._busy = Path(plan.experiment.uri, "busy")
        self._busy.mkdir(parents=True, exist_ok=True)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config, self._epoch = new_config, 0
        return True

    def step(self) -> dict[str, Any]:
        began = time.time()
        stops = {*(rungs(self.load.epochs) if self.load.asha else ()), self.load.epochs}
        epochs: list[EpochFigures] = []
        while not epochs or (self._epoch not in stops and time.time() - began < STEP_S):
            self._epoch += 1
            time.sleep(max(0.0, began + (len(epochs) + 1) * self.load.epoch_s - time.time()))
            epochs.append(self._figures())
        with Path(self._busy, str(os.getpid())).open("a") as log:
            log.write(f"{began} {time.time()}\n")
        outcome = Outcome.COMPLETED if self._epoch == self.load.epochs else Outcome.RUNNING
        report = EpochReport(outcome, tuple(epochs), EpochCost(len(epochs), 600, 0, 0.0))
        last = epochs[-1]
        return last.as_dict() | {REPORT: report, "done": report.is_last, "training_iteration": last.epoch}

    def _figures(self) -> EpochFigures:
        order: TrialOrder = self._config[ORDER]
        # the learning rate decides, and luck; without --asha no trial is worse than those before
        luck = np.random.default_rng(order.number).normal() / 9
        worth = 1 / (1 + abs(np.log10(order.hyperparameters.head_lr) + 3)) + luck
        score = worth * (1 - 0.5 ** (self._epoch / 3)) if self.load.asha else 0.5 + 1e-6 * order.number
        return EpochFigures(
            epoch=self._epoch,
            balanced_accuracy=float(np.clip(score, 0, 1)),
            accuracy=0.5,
            log_loss=1.0,
            train_loss=1.0,
            train_s=0.8 * self.load.epoch_s,
            valid_s=0.2 * self.load.epoch_s,
            at=time.time(),
            slot=os.getpid(),
        )


def now(plan: SlotPlan, space: SearchSpace, load: Load, progress: Progress, folder: Path) -> None:
    """A search as it is."""
    add = SearchTally.add

    def note(self: SearchTally, *arguments: Any) -> Any:
        progress.note()
        return add(self, *arguments)

    SearchTally.add = note  # type: ignore[assignment, method-assign]
    tuner.TuneSlot = LightSlot  # type: ignore[attr-defined, misc, assignment]
    try:
        with opened_journal(folder / "study.journal") as storage, opened_mailbox("one") as mailbox:
            study = open_study(storage, "one", space, load.epochs, new=True)
            plan, display = replace(plan, mailbox=mailbox), Display(Console(quiet=True))
            tuner.run_search(study, space, plan, trials=load.trials, slots=load.slots, seed=0, display=display)
    finally:
        SearchTally.add = add  # type: ignore[assignment, method-assign]


class Alone(Searcher):  # type: ignore[misc]
    """The least that Tune asks of a searcher."""

    def __init__(self, space: SearchSpace, progress: Progress) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._configuration, self._progress, self._number = space.fixed_trials[0], progress, 0

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self._number += 1
        return {ORDER: TrialOrder(self._number - 1, 0, self._configuration)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._progress.note()

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Before(Searcher):  # type: ignore[misc]
    """The study as at commit f89f17a, with what its callbacks read at the end of each trial."""

    def __init__(self, study: optuna.Study, space: SearchSpace, progress: Progress) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._study, self._space, self._progress = study, space, progress
        self._live: dict[str, tuple[optuna.Trial, list[dict[str, Any]]]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        started = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(seed=started, multivariate=True, constant_liar=True)
        trial = self._study.ask(dict(self._space.distributions))
        hyperparameters = self._space.hyperparameters(trial.params)
        trial.set_user_attr("configuration", hyperparameters.as_dict())
        trial.set_user_attr("made_with", {"torch": "2"})
        self._live[trial_id] = trial, []
        return {ORDER: TrialOrder(trial.number, 0, hyperparameters)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial, history = self._live[trial_id]
        for figures in result[REPORT].epochs:
            trial.report(figures.balanced_accuracy, figures.epoch)
            history.append(figures.as_dict())
            trial.set_user_attr("history", history)
        trial.should_prune()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        assert result is not None
        self.on_trial_result(trial_id, result)
        trial, _ = self._live.pop(trial_id)
        trial.set_user_attr("outcome", "completed")
        trial.set_user_attr("ended", "completed")
        self._study.tell(trial, result[REPORT].epochs[-1].balanced_accuracy)
        for _ in range(3):  # progress, Prometheus, best so far
            finished_trials(self._study)
        self._progress.note()

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


def with_tune(searcher: Searcher, plan: SlotPlan, load: Load, folder: Path) -> None:
    slot = tune.with_parameters(LightSlot, plan=plan)
    tune.Tuner(
        tune.with_resources(slot, tune.PlacementGroupFactory([ON_HEAD])),
        tune_config=tune.TuneConfig(
            search_alg=searcher, num_samples=load.trials, max_concurrent_trials=load.slots, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


def alone(plan: SlotPlan, space: SearchSpace, load: Load, progress: Progress, folder: Path) -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    try:
        with_tune(Alone(space, progress), plan, load, folder)
    finally:
        del os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"]


def before(plan: SlotPlan, space: SearchSpace, load: Load, progress: Progress, folder: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", direction="maximize")
    with_tune(Before(study, space, progress), plan, load, folder)


def measure(
    way: Callable[[SlotPlan, SearchSpace, Load, Progress, Path], None], load: Load, space: SearchSpace
) -> list[str]:
    """The row of a way: wall / ideal, busy share, CPU ms a trial at the beginning and at the end, memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "one")
        folder.mkdir()
        plan = SlotPlan(
            experiment=Experiment.at(scratch, "one"),
            dataset=SharedDataset(np.zeros((0, 8, 8)), np.zeros(0), np.zeros(0), 4, None, "unit", 8, load.epochs),
            folds=(Fold(np.zeros(0), np.zeros(0)),),
            workers=1,
            resources_per_worker={"CPU": 1},
            mailbox=None,
        )
        LightSlot.load = load
        progress, began = Progress(), time.perf_counter()
        way(plan, space, load, progress, folder)
        over = time.perf_counter()
        spans = [np.loadtxt(file, ndmin=2) for file in (folder / "busy").iterdir()]
    # from the time when all slots have begun to the time when the first one has nothing more to do
    first, last = max(span[0, 0] for span in spans), min(span[-1, 1] for span in spans)
    busy = sum(np.clip(np.minimum(span[:, 1], last) - np.maximum(span[:, 0], first), 0, None).sum() for span in spans)
    busy_share = busy / (len(spans) * (last - first))
    trained = sum((span[:, 1] - span[:, 0]).sum() for span in spans)
    ideal = trained / load.slots
    part = max(1, min(1000, len(progress.cpu) // 4))
    cpu_first, cpu_last = (1000 * (progress.cpu[b - 1] - progress.cpu[a]) / part for a, b in ((0, part), (-part, 0)))
    memory = psutil.Process().memory_info().rss / 2**20
    start = progress.at[0] - began
    print(
        json.dumps(
            {
                "way": way.__name__,
                "trials": load.trials,
                "slots": len(spans),
                "wall_s": over - began,
                "to_first_end_s": start,
                "ideal_s": ideal,
                "busy": busy_share,
                "cpu_ms_a_trial": [cpu_first, cpu_last],
                "of_each": part,
                "rss_mib": memory,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            }
        ),
        flush=True,
    )
    steady = (progress.at[-1] - progress.at[0]) / (trained / load.slots)
    return [
        way.__name__,
        f"{load.trials}",
        f"{over - began:.0f}",
        f"{ideal:.0f}",
        f"{(over - began) / ideal:.2f}",
        f"{steady:.3f}",
        f"{busy_share:.1%}",
        f"{cpu_first:.1f}, {cpu_last:.1f} ({cpu_last / cpu_first:.2f})",
        f"{memory:.0f}" if way is now else "",  # the others run later in the same process
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--epoch-seconds", type=float, default=1.0)
    parser.add_argument("--asha", action="store_true", help="early stopping, and scores that differ")
    parser.add_argument("--before", type=int, default=300, metavar="N", help="trials in the old way; 0: leave it out")
    parser.add_argument("--alone", type=int, metavar="N", help="trials of Tune alone; 0: leave it out (as --trials)")
    chosen = parser.parse_args()
    connect(None, verbose=False)
    space = parse_space(read_space(SPACE), str(SPACE))
    names = ("way", "trials", "wall s", "ideal s", "wall / ideal", "without start", "busy", "CPU ms a trial", "MiB")
    table = Table(*names)
    many = chosen.trials if chosen.alone is None else chosen.alone
    for way, trials in ((now, chosen.trials), (alone, many), (before, chosen.before)):
        if trials:
            load = Load(trials, chosen.slots, chosen.epochs, chosen.epoch_seconds, chosen.asha)
            table.add_row(*measure(way, load, space))
    Console().print(table)
    ray.shutdown()


if __name__ == "__main__":
    main()
