"""One trial of a search trained again, from what the experiment recorded of it: the same figures, or how far off.

python -m lungct_tune.replay --help
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lungct_tune.cli import command_line, exit_status
from lungct_tune.errors import UserError
from lungct_tune.experiment.folder import locate

EXAMPLES = """\
examples:
  python -m lungct_tune.replay 2026-11-23-054807-phantoms 3      trial 3 of an experiment in ./results
  python -m lungct_tune.replay s3://bucket/lungct_tune/NAME 12 --data chest-ctscan

On CPUs with the same versions the figures are the same to the last digit.
Exit status: 0 the same figures, 1 others, 2 it could not be trained again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 1 where figures differ, 2 for what the user can mend."""
    parser = command_line(
        "replay", "Train one trial of a search again, and compare its figures with those that were recorded.", EXAMPLES
    )
    parser.add_argument("source", metavar="EXPERIMENT", help="an experiment's NAME, path or URI")
    parser.add_argument("trial", metavar="TRIAL", type=int, help="the number of a trial, as in trials.csv")
    parser.add_argument("--storage", metavar="URI", default="./results", help="where NAME lies (./results)")
    parser.add_argument("--data", metavar="DIR", help="the images, or a URI (where they were for the search)")
    parser.add_argument("--address", metavar="ADDR", help="a running Ray cluster (the one at hand, else a local one)")
    asked = parser.parse_args(argv)
    return exit_status(lambda: _run(asked, Console(highlight=False)))


def _run(asked: argparse.Namespace, console: Console) -> int:
    # imported when the command line is known to be right, so that --help answers at once
    import ray

    started_here = not ray.is_initialized()
    try:
        return 0 if replay(asked, console) else 1
    finally:
        if started_here:
            ray.shutdown()


class NotReplayable(UserError):
    """A trial that cannot be trained again: the message says why."""


def replay(asked: argparse.Namespace, console: Console) -> bool:
    """Trains the trial again and prints each epoch's figures beside those recorded; whether all are the same.

    Raises:
        NotReplayable: there is no such trial, it ended no epoch, or it could not be trained again.
        UserError: each room's own, with a message for the user.
    """
    import ray

    from lungct_tune.config.hyperparameters import Hyperparameters
    from lungct_tune.experiment.plan import read_plan
    from lungct_tune.experiment.results import read_results
    from lungct_tune.models.pretrained import read_covering
    from lungct_tune.tuning.cluster import connect, has_shared_file_system, plan_resources
    from lungct_tune.tuning.rerun import train_again
    from lungct_tune.tuning.shared_data import share_dataset
    from lungct_tune.tuning.trial_runner import Fold
    from lungct_tune.tuning.tuner import provenance
    from lungct_tune.tuning.workers import SlotPlan

    experiment = locate(asked.source, asked.storage)
    trials = {trial.number: trial for trial in read_results(experiment).trials}
    if asked.trial not in trials:
        has = f"it has {min(trials)} to {max(trials)}" if trials else "none has begun"
        raise NotReplayable(f"{experiment.name} has no trial {asked.trial}; {has}")
    recorded = trials[asked.trial].user_attrs
    history = recorded.get("history", [])
    if not history:
        raise NotReplayable(
            f"trial {asked.trial} of {experiment.name} ended no epoch: there is nothing to compare with"
        )
    plan = read_plan(experiment, **({"data": asked.data} if asked.data else {}))
    dealt, settings = plan.load_and_split(), plan.settings.model_copy(update={"slots": 1, "address": asked.address})
    weights = None if settings.weights == "none" else read_covering(settings.weights or "", plan.space.deepest)
    connect(settings.address, verbose=False, name=f"{experiment.name} again")
    allotment = plan_resources(settings)
    configuration = Hyperparameters(**recorded["configuration"])
    console.print(
        f"trial {asked.trial} of {experiment.name}: {configuration}; {len(history)} epochs again", soft_wrap=True
    )
    order = {"number": asked.trial, "seed": settings.seed, "configuration": recorded["configuration"]}
    folder = f"{experiment.name}-again"
    experiment.delete_folder(folder)  # of an interrupted one, perhaps with other versions
    with tempfile.TemporaryDirectory(dir=experiment.uri if experiment.is_local else None) as common:
        path = Path(common, "images.npy") if has_shared_file_system(experiment) else None
        backbone = None if weights is None else ray.put(weights)
        slot = SlotPlan(
            experiment=experiment,
            material=share_dataset(settings, dealt.images, dealt.searched, backbone, path=path),
            folds=tuple(Fold(*fold) for fold in dealt.folds),
            workers=allotment.workers,
            resources_per_worker=allotment.resources_per_worker,
        )
        answer = train_again(slot, folder, [order], len(history), slots=1)[0]
    experiment.delete_folder(folder)
    if "epoch" not in answer:
        raise NotReplayable(f"trial {asked.trial} failed this time: {answer.get('diverged') or answer['failed']}")
    changed = _changed(recorded.get("made_with", {}), provenance(slot))
    return _compare(history, [*answer["earlier"], answer], changed, console)


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {then.get(name)}, now {now.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)
    ]


def _compare(
    then: Sequence[Mapping[str, float]], now: Sequence[Mapping[str, float]], changed: Sequence[str], console: Console
) -> bool:
    from lungct_tune.training.objective import OBJECTIVE

    names = ("train_loss", OBJECTIVE, "accuracy", "log_loss")
    table = Table(
        "epoch", *(name.replace("_", " ") for name in names), title="recorded, and off by", title_justify="left"
    )
    for old, new in zip(then, now, strict=True):
        table.add_row(str(old["epoch"]), *(f"{old[name]:.6f} {new[name] - old[name]:+.1e}" for name in names))
    console.print(table)
    off, name, epoch = max(
        (abs(new[name] - old[name]), name, old["epoch"]) for old, new in zip(then, now, strict=True) for name in names
    )
    if changed:
        console.print(f"made with others than now: {'; '.join(changed)}", style="yellow", soft_wrap=True, markup=False)
    if off == 0:
        console.print(f"the same figures in all {len(then)} epochs, to the last digit")
    else:
        console.print(f"figures differ: most by {off:.2g}, in {name.replace('_', ' ')} of epoch {epoch}")
    return off == 0


if __name__ == "__main__":
    sys.exit(main())
