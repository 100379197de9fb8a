"""Trials trained again, in slots but outside Ray Tune: no study, nothing stopped early."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lungct_tune.experiment.folder import Experiment
from lungct_tune.tuning.slots import Slot
from lungct_tune.tuning.workers import SlotPlan


def train_again(
    plan: SlotPlan, folder: str, orders: Sequence[dict[str, Any]], epochs: int, slots: int
) -> list[dict[str, Any]]:
    """The workers' last answer to each order, after so many epochs; those before it are its "earlier".

    What was trained stays in the experiment's folder, so that an interrupted training goes on where it was.

    Args:
        orders: `{"number": int, "seed": int, "configuration": {...}}`, the numbers distinct.
        slots: how many are trained at once, at most.
    """
    plan = replace(plan, experiment=Experiment.at(plan.experiment.uri, folder))
    at_once = min(slots, len(orders))
    stopped = threading.Event()

    def run(slot: Slot, mine: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [_last_answer(slot, order, epochs, stopped) for order in mine]

    with ThreadPoolExecutor(at_once) as pool:
        running = [Slot(plan) for _ in range(at_once)]
        try:
            by_slot = list(pool.map(run, running, [orders[slot::at_once] for slot in range(at_once)]))
        finally:  # where this was interrupted, the pool waits for its threads, and they for workers
            stopped.set()
            for slot in running:
                slot.release()
    return [by_slot[i % at_once][i // at_once] for i in range(len(orders))]


def _last_answer(slot: Slot, order: dict[str, Any], epochs: int, stopped: threading.Event) -> dict[str, Any]:
    earlier: list[dict[str, float]] = []
    while not stopped.is_set():
        answer = slot.run_epoch(order)
        earlier += answer.get("earlier", [])
        if answer["done"] or answer["epoch"] >= epochs:
            return answer | {"earlier": earlier}
        earlier.append(answer)
    raise KeyboardInterrupt
