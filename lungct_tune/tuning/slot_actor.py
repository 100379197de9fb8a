"""A slot that Ray Tune does not manage, in an actor on the head node."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray

from lungct_tune.experiment.trial import EpochReport, TrialOrder
from lungct_tune.tuning.retrain import RetrainOrder
from lungct_tune.tuning.slots import ON_HEAD, Slot
from lungct_tune.tuning.workers import SlotPlan

RELEASE_S = 15.0
"""How long workers get to end."""

KILLED_S = 10.0
"""How long an actor that is killed gets to be gone."""


class SlotActor:
    """A slot in an actor.

    Its workers' placement group has the slot's name. So it can be removed after the actor was killed.

    Args:
        search: see `Slot`.
    """

    def __init__(self, plan: SlotPlan, search: str = "") -> None:
        actor = ray.remote(Slot).options(num_cpus=0, resources=ON_HEAD, max_concurrency=2)
        self._actor: Any = actor.remote(plan, search)

    def run(self, order: TrialOrder | RetrainOrder) -> ray.ObjectRef[EpochReport]:
        """Starts a step (see `Slot.run`); returns its future report."""
        future: ray.ObjectRef[EpochReport] = self._actor.run.remote(order)
        return future

    def end(self) -> None:
        """Ends the workers and the actor. Then the slot's placement group can be removed, if one is left."""
        with suppress(ray.exceptions.RayError):
            ray.get(self._actor.release.remote(), timeout=RELEASE_S)
        ray.kill(self._actor)
        deadline = time.monotonic() + KILLED_S
        while time.monotonic() < deadline:  # until it is gone it may make a placement group
            try:
                ray.get(self._actor.__ray_ready__.remote(), timeout=1)
            except ray.exceptions.RayActorError:
                return
            except ray.exceptions.GetTimeoutError:
                continue
            time.sleep(0.05)
