"""Trains one trial of a search again, from its record in the experiment, and compares the figures.

python -m lungct_tune.replay --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lungct_tune.cli import command_line, exit_status, terminal
from lungct_tune.display import print_prose
from lungct_tune.errors import UserError, number_of

if TYPE_CHECKING:
    import torch

    from lungct_tune.data.split import DataSplit
    from lungct_tune.experiment.folder import Experiment
    from lungct_tune.experiment.plan import Plan
    from lungct_tune.experiment.trial import EpochFigures, TrialRecord

EXAMPLES = """\
examples:
  python -m lungct_tune.replay 2026-11-23-054807-phantoms 3      trial 3 of an experiment in ./results
  python -m lungct_tune.replay s3://bucket/lungct_tune/NAME 12 --data chest-ctscan

On CPUs with the same versions and precision (bfloat16 where they compute in it, else float32) the figures are the
same to the last digit. The last digits differ for a trial that was interrupted, if more than two workers shared its
batches.
Exit status: 0 if the figures are the same, 1 if they differ, 2 if the trial cannot be trained again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 1 if figures differ, 2 for an error that the user can fix."""
    parser = command_line("replay", EXAMPLES)
    parser.add_argument("source", metavar="EXPERIMENT", help="an experiment's NAME, path or URI")
    parser.add_argument("trial", metavar="TRIAL", type=int, help="the number of a trial, as in trials.csv")
    parser.add_argument("--storage", metavar="URI", default="./results", help="where NAME is (./results)")
    parser.add_argument("--data", metavar="DIR", help="the images, or a URI (where they were for the search)")
    parser.add_argument("--table", metavar="FILE", help="the table of the images (where it was for the search)")
    parser.add_argument("--weights", metavar="FILE", help="the pretrained weights (where they were for the search)")
    parser.add_argument("--study", metavar="URL", help="the study's database, if the search had a --study")
    parser.add_argument(
        "--address", metavar="ADDR", help="address of a Ray cluster (the running one, else a local one)"
    )
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked, terminal()))


def _run(asked: argparse.Namespace, console: Console) -> int:
    # imported only after the command line is checked, so that --help answers at once
    from lungct_tune.experiment.folder import locate
    from lungct_tune.experiment.plan import check_place, read_plan
    from lungct_tune.tuning.cluster import joined

    experiment = locate(asked.source, asked.storage)
    trial = find_trial(experiment, asked.trial, asked.study)
    elsewhere = {name: value for name in ("data", "table", "weights") if (value := getattr(asked, name))}
    plan = read_plan(experiment, {*elsewhere, "study"}, slots=1, **elsewhere)
    check_place(experiment)
    split, weights = plan.load_and_split(), plan.read_weights()
    with joined(asked.address, verbose=False, name=f"{experiment.name} again"):
        return 0 if replay(plan, split, weights, trial, console) else 1


class NotReplayable(UserError):
    """A trial cannot be trained again. The message says why."""


def find_trial(experiment: Experiment, number: int, study: str | None = None) -> TrialRecord:
    """Finds the record of a trial.

    Args:
        study: the URL of the study's database, if it is in one.

    Raises:
        NotReplayable: there is no such trial, or none of its epochs has ended.
        NothingHeld, SettingsError: see `read_results`.
    """
    from lungct_tune.experiment.results import read_results

    trials = {trial.number: trial for trial in read_results(experiment, study).trials}
    if number not in trials:
        has = f"it has {min(trials)} to {max(trials)}" if trials else "none has begun"
        raise NotReplayable(f"{experiment.name} has no trial {number}; {has}")
    if not trials[number].history:
        raise NotReplayable(f"no epoch of trial {number} of {experiment.name} has ended, so there are no figures")
    return trials[number]


def replay(
    plan: Plan, split: DataSplit, weights: dict[str, torch.Tensor] | None, trial: TrialRecord, console: Console
) -> bool:
    """Trains the trial again and prints each epoch's figures beside the recorded ones.

    Args:
        plan: that of the search, with one slot.
        weights: the pretrained weights; None for random ones.

    Returns:
        Whether all figures are the same.

    Raises:
        NotReplayable: the training failed this time.
        ClusterError, StorageError: the cluster or the storage cannot be used.
    """
    from lungct_tune.tuning.rerun import replay_trial

    console.print(
        f"trial {trial.number} of {plan.experiment.name}: {trial.hyperparameters}; "
        f"{number_of(len(trial.history), 'epoch')} again",
        soft_wrap=True,
    )
    report, provenance = replay_trial(plan, split, weights, trial, lambda said: print_prose(console, said, "yellow"))
    if len(report.epochs) < len(trial.history):  # a trial that diverged may do so again, in the epoch after these
        raise NotReplayable(f"trial {trial.number} failed this time: {report.reason}")
    return _compare(trial.history, report.epochs, _changed(trial.provenance, provenance), console)


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    then = {"precision": now.get("precision"), **then}  # earlier searches did not note it
    return [
        f"{name} {then.get(name)}, now {now.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)
    ]


def _compare(
    then: Sequence[EpochFigures], now: Sequence[EpochFigures], changed: Sequence[str], console: Console
) -> bool:
    names = ("train_loss", "balanced_accuracy", "accuracy", "log_loss")
    titles = (name.replace("_", " ") for name in names)
    table = Table("epoch", *titles, title="recorded figures, and how the new ones differ", title_justify="left")
    largest, where = 0.0, ""
    for old, new in zip(then, now, strict=True):
        recorded, repeated = old.as_dict(), new.as_dict()
        differences = {name: repeated[name] - recorded[name] for name in names}
        table.add_row(str(old.epoch), *(f"{recorded[name]:.6f} {differences[name]:+.1e}" for name in names))
        name = max(differences, key=lambda name: abs(differences[name]))
        if abs(differences[name]) > largest:
            largest, where = abs(differences[name]), f"{name.replace('_', ' ')} of epoch {old.epoch}"
    console.print(table)
    if changed:
        console.print(
            f"versions or resources differ: {'; '.join(changed)}", style="yellow", soft_wrap=True, markup=False
        )
    if largest == 0:
        console.print(f"the same figures in all {len(then)} epochs, to the last digit")
    else:
        console.print(f"figures differ: the largest difference is {largest:.2g}, in {where}")
    return largest == 0


if __name__ == "__main__":
    sys.exit(main())
