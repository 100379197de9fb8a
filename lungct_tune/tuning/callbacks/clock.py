"""Measures the time of a search and of its slots, and writes it to the study."""

from __future__ import annotations

import time
from typing import Any

import optuna

from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.groups import waiting_for_room
from lungct_tune.tuning.slot_plan import SlotPlan

COUNT_EVERY_S = 1.0


class SlotTimeCallback(SearchCallback):
    """Writes the wall time of the search to the study, and the time of the slots that have room on the cluster."""

    def __init__(self, study: optuna.Study, plan: SlotPlan, slots: int) -> None:
        self._study, self._search_slots, self._slots = study, plan.slots, slots
        self._wall_s, self.slot_s = study.user_attrs.get("wall_s", 0.0), study.user_attrs.get("slot_s", 0.0)
        self._counted = self._kept = time.monotonic()
        self.waiting = 0
        """How many slots wait for room on the cluster."""

    def __enter__(self) -> SlotTimeCallback:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._count()
        if error is None:  # else the study may be what cannot be written
            self._keep()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if time.monotonic() - self._counted >= COUNT_EVERY_S:
            self._count()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        # only after an epoch, which changes the study anyway: with remote storage each change uploads another copy
        if self._counted > self._kept:
            self._keep()

    def _count(self) -> None:
        self.waiting = min(waiting_for_room(self._search_slots), self._slots)
        now = time.monotonic()
        self._wall_s += now - self._counted
        self.slot_s += (now - self._counted) * (self._slots - self.waiting)
        self._counted = now

    def _keep(self) -> None:
        self._kept = self._counted
        self._study.set_user_attr("wall_s", self._wall_s)
        self._study.set_user_attr("slot_s", self.slot_s)
