"""Trains trials again, in slots but without Ray Tune, a study or early stopping."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

from lungct_tune.data.split import DataSplit
from lungct_tune.errors import UserError
from lungct_tune.experiment.folder import Experiment, trial_folder
from lungct_tune.experiment.metrics import SeedComparison
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import compare_seeds
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder, TrialRecord
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning.allocation import divide
from lungct_tune.tuning.cluster import cluster_nodes, has_shared_file_system
from lungct_tune.tuning.mailbox import news_exchanged, opened_mailbox
from lungct_tune.tuning.slot_actor import SlotQueue
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.time_left import TimeLeft
from lungct_tune.tuning.tuner import make_slot_plan, provenance


class SeedFailed(UserError):
    """A training with another seed failed, by no fault of its configuration. The message says why and what to do."""


def rerun_trials(
    plan: SlotPlan,
    folder: str,
    orders: Sequence[TrialOrder],
    epochs: int,
    slots: int,
    note: Callable[[TrialOrder, EpochReport], None] = lambda order, report: None,
) -> list[EpochReport]:
    """Trains each order for at most `epochs` epochs; returns the last report of each, with all its epochs.

    The states are in an experiment's folder beside the search's, so that an interrupted training can continue.

    Args:
        folder: the name of that folder.
        orders: with distinct numbers.
        slots: how many are trained at the same time, at most.
        note: see `SlotQueue.run`.
    """
    plan = replace(plan, experiment=Experiment.at(plan.experiment.uri, folder))
    queue = SlotQueue(plan)
    try:
        queue.start(min(slots, len(orders)))
        futures = queue.run(orders, note, epochs)
        queue.wait(futures)
        return [future.result() for future in futures]
    finally:
        queue.end()


def rerun_with_seeds(
    plan: SlotPlan,
    winner: TrialRecord,
    published: TrialRecord | None,
    seeds: Sequence[int],
    slots: int,
    left: TimeLeft,
) -> SeedComparison:
    """Trains the winner and the published configuration once with each of these seeds; see `compare_seeds`.

    A training that had ended before an interruption is only read.

    Args:
        plan, slots: see `rerun_trials`.
        published: the trial of the published configuration; None if it is not trained.
        left: is told how far the trainings are.

    Raises:
        SeedFailed: a training has lost its workers too often, so there is no figure for its seed.
        StorageError: what had ended before cannot be read.
    """
    both = [winner] if published is None else [winner, published]
    runs = dict(enumerate(product(both, seeds), start=1))
    orders = [TrialOrder(number, seed, trial.hyperparameters) for number, (trial, seed) in runs.items()]
    folder, epochs = seeds_folder(plan.experiment), plan.dataset.epochs
    experiment = Experiment.at(plan.experiment.uri, folder)

    def note(order: TrialOrder, report: EpochReport) -> None:
        if report.outcome is Outcome.FAILED:
            raise SeedFailed(
                f"trial {runs[order.number][0].number} could not be trained with seed {order.seed}: {report.reason}\n"
                "Fix the cause (Ray's log files have the full error; --verbose prints it); "
                "the search is kept, and --resume continues with the seeds"
            )
        left.note_seed(order.number, epochs if report.is_last else len(report.epochs))
        if report.is_last:
            try:
                experiment.write(_report_file(order), json.dumps(_report_as_dict(order, epochs, report)).encode())
            except StorageError as error:
                plan.mailbox.warn.remote(
                    f"the training with seed {order.seed} has ended, but its figures are not saved: {error}"
                )

    reports = {order.number: _read_report(experiment, order, epochs) for order in orders}
    todo = [order for order in orders if reports[order.number] is None]
    left.train_seeds({order.number: order.hyperparameters for order in todo})
    if todo:
        new = rerun_trials(plan, folder, todo, epochs, slots, note)
        reports |= {order.number: report for order, report in zip(todo, new, strict=True)}
    in_order = [report for report in reports.values() if report is not None]
    return compare_seeds(in_order[: len(seeds)], in_order[len(seeds) :])


def seeds_folder(experiment: Experiment) -> str:
    """The folder of the trainings with other seeds."""
    return f"{experiment.name}-seeds"


def _report_file(order: TrialOrder) -> str:
    """Has the last report of a training that has ended."""
    return f"{trial_folder(order.number)}/report.json"


def _report_as_dict(order: TrialOrder, epochs: int, report: EpochReport) -> dict[str, Any]:
    history = [figures.as_dict() for figures in report.epochs]
    return {"order": order.identity, "epochs": epochs, "outcome": report.outcome.value, "history": history}


def _read_report(experiment: Experiment, order: TrialOrder, epochs: int) -> EpochReport | None:
    """The last report of a training that has ended; None if it was another one, or with a warning if it is damaged."""
    if (content := experiment.read(_report_file(order))) is None:
        return None
    try:
        kept = json.loads(content)
        if (kept.get("order"), kept.get("epochs")) != (order.identity, epochs):
            return None
        return EpochReport(Outcome(kept["outcome"]), tuple(EpochFigures(**figures) for figures in kept["history"]))
    except (ValueError, TypeError, KeyError, AttributeError):  # by a machine that was lost, or by somebody
        what, file = f"the training with seed {order.seed}", f"{experiment.uri}/{_report_file(order)}"
        logging.getLogger(__name__).warning("%s runs again: %s is damaged", what, file)
        return None


def replay_trial(
    plan: Plan, split: DataSplit, weights: dict[str, Any] | None, trial: TrialRecord, warn: Callable[[str], None]
) -> tuple[EpochReport, dict[str, Any]]:
    """Trains a recorded trial again, for as many epochs as it had; returns its report and the new provenance.

    Args:
        plan: that of the search, with one slot.
        weights: pretrained weights; None starts from random ones.
        warn: is called with what the slot and its workers have to say, a sentence each.
    """
    experiment = plan.experiment
    folder = f"{experiment.name}-again-{uuid4().hex[:8]}"  # its own, since there may be another replay now
    try:
        with (
            tempfile.TemporaryDirectory(dir=experiment.uri if experiment.is_local else None) as common,
            opened_mailbox(folder) as mailbox,
            news_exchanged(mailbox, warn),
        ):
            file = Path(common, "images.npy") if has_shared_file_system(experiment) else None
            resources = divide(plan.settings, *cluster_nodes())
            slot = make_slot_plan(plan, split, weights, resources, mailbox, file)
            order = TrialOrder(trial.number, plan.settings.seed, trial.hyperparameters)
            (report,) = rerun_trials(slot, folder, [order], len(trial.history), slots=1)
    finally:
        experiment.delete_folder(folder)
    return report, provenance(slot)
