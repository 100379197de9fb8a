"""A search's own metrics, exported together with Ray's. Prometheus sees them with Ray's prefix, `ray_lungct_…`.

The driver sets all of them. Ray drops a gauge that has not been set for some twenty seconds. An epoch may take longer,
and a worker cannot set a gauge during an epoch.
"""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Counter, Gauge, Metric

from lungct_tune.experiment.trial import UNSUCCESSFUL, EpochReport, Outcome
from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.callbacks.clock import SlotTimeCallback
from lungct_tune.tuning.slots import REPORT
from lungct_tune.tuning.tally import SearchTally

ENDINGS = (Outcome.COMPLETED, Outcome.STOPPED, *UNSUCCESSFUL)

REFRESH_S = 5
"""How often gauges are set; Ray exports them every ten seconds."""


class PrometheusCallback(SearchCallback):
    """Exports trials by state, the best figure, and for every slot the speed of training and the cost of checkpoints.

    The share of training time is the inverse of the bundle's `overhead_ratio` for the search so far.

    Args:
        training_s: seconds inside epochs before, if the search is resumed.
    """

    def __init__(
        self, tally: SearchTally, search: str, trials: int, clock: SlotTimeCallback, training_s: float
    ) -> None:
        def metric(kind: type[Metric], name: str, description: str, *tags: str) -> Any:
            return kind(name, description, ("search", *tags)).set_default_tags({"search": search})

        self._tally, self._asked, self._clock = tally, trials, clock
        self._trials = metric(Gauge, "lungct_trials", "Trials by state", "state")
        self._best = metric(Gauge, "lungct_best_balanced_accuracy_ratio", "Best of the trials that ran to their end")
        self._share = metric(Gauge, "lungct_training_time_ratio", "Share of the slots' time that was inside epochs")
        self._epoch = metric(Gauge, "lungct_epoch_seconds", "Training and validation in a slot's last epoch", "slot")
        self._speed = metric(Gauge, "lungct_images_per_second", "Training in a slot's last epoch", "slot")
        self._bytes = metric(Counter, "lungct_checkpoint_bytes_total", "Written by a slot's checkpoints", "slot")
        self._seconds = metric(Counter, "lungct_checkpoint_seconds_total", "A slot's time on checkpoints", "slot")

        self._of_slots: dict[tuple[Gauge, str], float] = {}
        self._refreshed = 0.0
        self._training_s = training_s

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Sets all gauges again every `REFRESH_S` seconds. Tune calls this some ten times a second."""
        if time.monotonic() >= self._refreshed + REFRESH_S:
            self._set_gauges(trials)

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        self._set_gauges(trials)

    def _set_gauges(self, trials: list[Any]) -> None:
        self._refreshed = time.monotonic()
        in_slots = sum(trial.status == "RUNNING" for trial in trials)
        states = {outcome.value: self._tally.outcomes[outcome] for outcome in ENDINGS}
        states["waiting for room"] = min(self._clock.waiting, in_slots)
        states["running"] = in_slots - states["waiting for room"]
        states["waiting"] = max(0, self._asked - self._tally.finished - in_slots)
        for state, count in states.items():
            self._trials.set(count, {"state": state})
        if self._tally.best is not None and self._tally.best.last is not None:
            self._best.set(self._tally.best.last.balanced_accuracy)
        if self._clock.slot_s and self._training_s:
            self._share.set(self._training_s / self._clock.slot_s)
        for (gauge, slot), value in self._of_slots.items():
            gauge.set(value, {"slot": slot})

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        report: EpochReport = result[REPORT]
        if (cost := report.cost) is None or not report.trained:  # the training diverged, or had already ended
            return
        figures = report.trained[-1]
        slot = str(figures.slot)
        # a state may be copied in one step and written in a later one, and Ray refuses to add zero
        for counter, amount in ((self._bytes, cost.checkpoint_bytes), (self._seconds, cost.checkpoint_s)):
            if amount:
                counter.inc(amount, {"slot": slot})
        self._training_s += sum(figures.seconds for figures in report.trained)
        self._of_slots[self._epoch, slot] = figures.seconds
        self._of_slots[self._speed, slot] = cost.images / figures.train_s
