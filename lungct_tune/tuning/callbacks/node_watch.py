"""Tells workers that their node will be lost, and prints what slots and workers have to say."""

from __future__ import annotations

import time
from typing import Any

import ray
from rich.console import Console

from lungct_tune.display import print_prose
from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.ray_compat import draining_nodes

PERIOD_S = 1.0


class NodeWatchCallback(SearchCallback):
    """Exchanges news with the slots through their mailbox, once a second."""

    def __init__(self, mailbox: Any, console: Console) -> None:
        self._mailbox, self._console = mailbox, console
        self._answer: Any = None
        self._asked = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._print()
        if self._answer is None and time.monotonic() - self._asked >= PERIOD_S:
            self._asked = time.monotonic()
            self._answer = self._mailbox.exchange.remote(draining_nodes())

    def _print(self) -> None:
        answer, self._answer = self._answer, None
        try:
            warnings: list[str] = ray.get(answer)
        except ray.exceptions.RayError:  # the mailbox is being started again
            return
        for warning in warnings:
            print_prose(self._console, warning, "yellow")
