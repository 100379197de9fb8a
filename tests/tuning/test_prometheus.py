"""The search's own metrics; test_watching has Prometheus read them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lungct_tune.experiment.trial import EpochCost, EpochFigures, EpochReport, Outcome
from lungct_tune.tuning.callbacks.prometheus import PrometheusCallback
from lungct_tune.tuning.slots import REPORT
from lungct_tune.tuning.tally import SearchTally


@pytest.mark.parametrize("cost", [EpochCost(32, 0, 0.0), EpochCost(32, 0, 0.1), EpochCost(32, 1000, 0.0)])
def test_a_state_may_be_copied_in_one_step_and_be_written_in_another(cost: EpochCost) -> None:
    """Ray's counters refuse to add zero, and an error in a callback would end the search."""
    callback = PrometheusCallback(SearchTally([]), "one", 1, SimpleNamespace(waiting=0, slot_s=0.0), 0.0)  # type: ignore[arg-type]
    figures = EpochFigures(1, 0.5, 0.5, 1.0, 1.0, train_s=1.0, valid_s=0.1, slot=1)
    result = {REPORT: EpochReport(Outcome.RUNNING, (figures,), cost)}
    callback.on_trial_result(1, [], None, result)
    assert callback._training_s == 0, "an epoch without a time is one from before"
