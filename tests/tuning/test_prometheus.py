"""The metrics that a search exports."""

from __future__ import annotations

from typing import Any

from lungct_tune.experiment.trial import EpochCost, EpochFigures, EpochReport, Outcome
from lungct_tune.tuning.callbacks.prometheus import PrometheusCallback
from lungct_tune.tuning.slots import REPORT


def result(checkpoint_bytes: int, checkpoint_s: float) -> dict[str, Any]:
    figures = EpochFigures(1, 0.5, 0.5, 1.0, 1.0, train_s=1.0, valid_s=0.1, at=1e9, slot=1)
    return {REPORT: EpochReport(Outcome.RUNNING, (figures,), EpochCost(1, 8, checkpoint_bytes, checkpoint_s))}


def test_a_state_that_is_copied_in_one_step_and_written_in_a_later_one_counts_once() -> None:
    nothing: Any = None
    callback = PrometheusCallback(nothing, "one", 1, nothing, 0.0)
    added: list[float] = []
    for counter in (callback._bytes, callback._seconds):
        counter.inc = lambda amount, tags, inc=counter.inc: (inc(amount, tags), added.append(amount))
    for cost in ((0, 0.25), (0, 0.0), (1000, 0.0)):
        callback.on_trial_result(1, [], None, result(*cost))
    assert added == [0.25, 1000]
