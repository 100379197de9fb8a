"""Trials as they travel: orders, reports, records."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.trial import (
    EpochFigures,
    EpochReport,
    Outcome,
    TrialOrder,
    TrialRecord,
    best_trial,
)

EPOCH = EpochFigures(
    epoch=1, balanced_accuracy=0.5, accuracy=0.4, log_loss=1.0, train_loss=1.2, train_s=2.0, valid_s=0.5
)


def test_a_higher_balanced_accuracy_ranks_higher_and_ties_go_to_the_lower_negative_log_likelihood() -> None:
    assert EPOCH.rank > replace(EPOCH, log_loss=2.0).rank
    assert replace(EPOCH, balanced_accuracy=0.6, log_loss=9.0).rank > replace(EPOCH, log_loss=0.1).rank


def test_the_figures_of_an_epoch_and_what_they_depend_on_are_kept_as_plain_values() -> None:
    order = TrialOrder(7, 3, Hyperparameters(truncation_depth=4))
    assert set(order.identity) == {"number", "seed", "configuration"}  # the keys of states on storage
    assert replace(order, weights_from=(0.7, -0.9)).identity == json.loads(json.dumps(order.identity))
    assert EpochFigures(**EPOCH.as_dict()) == EPOCH and "slot" not in EPOCH.as_dict()
    assert pickle.loads(pickle.dumps(order)) == order


def test_a_report_is_the_last_unless_the_trial_goes_on_or_stays_as_it_is() -> None:
    goes_on = {outcome for outcome in Outcome if not EpochReport(outcome).is_last}
    assert goes_on == {Outcome.RUNNING, Outcome.REFUSED}


def test_only_a_trial_that_ran_to_its_end_can_be_the_best() -> None:
    better = replace(EPOCH, balanced_accuracy=0.9)
    trials = [
        TrialRecord(0, Hyperparameters(), (EPOCH,), Outcome.COMPLETED),
        TrialRecord(1, Hyperparameters(), (better,), Outcome.STOPPED),
        TrialRecord(2, Hyperparameters(), (better,), Outcome.DIVERGED),
        TrialRecord(3, Hyperparameters(), (EPOCH,), Outcome.COMPLETED),
    ]
    assert best_trial(trials) is trials[0]
    assert best_trial(trials[1:3]) is None
