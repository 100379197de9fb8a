"""Shows in Ray's dashboard how many trials have ended and which is the best: as the name of a task that waits.

The name of a task or an actor cannot be changed. So each time another task takes over, and the one before ends. It is a
task of its own, and none of the mailbox: the dashboard lists it beside the slots, where it is seen at once.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.mailbox import ENDED
from lungct_tune.tuning.tally import SearchTally

PERIOD_S = 2.0
"""The least time between two names, so that fast trials do not fill the dashboard."""


class ScoreboardCallback(SearchCallback):
    """Starts a task with another name when trials have ended, and ends the task before.

    Args:
        trials: how many the search has in all.
    """

    def __init__(self, mailbox: Any, tally: SearchTally, trials: int) -> None:
        self._mailbox, self._tally, self._trials = mailbox, tally, trials
        self._wait: Any = ray.remote(num_cpus=0, max_retries=0)(_wait)
        self._shown = -1
        self._at = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Tune calls this some ten times a second."""
        if time.monotonic() - self._at >= PERIOD_S:
            self._show()

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        self._show()

    def _show(self) -> None:
        if (ended := self._tally.finished) == self._shown:
            return
        before, self._shown, self._at = self._shown, ended, time.monotonic()
        best = self._tally.best
        name = f"{ended} of {self._trials} trials done"
        if best is not None and best.last is not None:
            name += f", best so far {100 * best.last.balanced_accuracy:.1f} % in trial {best.number}"
        self._mailbox.put.remote(("", ENDED, before), None)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._wait.options(name=name, scheduling_strategy=here).remote(self._mailbox, ended)


def _wait(mailbox: Any, ended: int) -> None:
    """Returns when more than so many trials have ended."""
    with suppress(ray.exceptions.RayActorError):  # the search has ended
        ray.get(mailbox.get.options(enable_task_events=False).remote(("", ENDED, ended)))
