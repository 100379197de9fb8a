"""Shows the progress of a search: a live display in a terminal, elsewhere a line for each finished trial."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from lungct_tune.experiment.trial import EpochReport
from lungct_tune.tuning.callbacks.clock import SlotTimeCallback
from lungct_tune.tuning.slots import REPORT
from lungct_tune.tuning.tally import SearchTally

SAY_WAITING_AFTER_S = 30.0


class ProgressCallback(tune.Callback):  # type: ignore[misc]
    """Shows the number of finished trials, the best trial so far, epochs per second and the time left."""

    def __init__(self, tally: SearchTally, trials: int, clock: SlotTimeCallback, console: Console) -> None:
        self._tally, self._trials, self._clock, self._console = tally, trials, clock, console
        self._said_waiting = False
        self._began, self._epochs = time.monotonic(), 0
        self._done_before = tally.finished
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render)

    def __enter__(self) -> ProgressCallback:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._clock.waiting and not self._said_waiting and time.monotonic() - self._began > SAY_WAITING_AFTER_S:
            self._said_waiting = True
            self._console.print(
                f"{self._clock.waiting} slots wait for room on the cluster; `ray status` says what it is waiting for",
                style="yellow",
            )

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        report: EpochReport = result[REPORT]
        self._epochs += len(report.trained)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._print(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._print(trial)

    def _print(self, trial: Any) -> None:
        this = self._tally.last
        if self._console.is_terminal or this is None or this.number != trial.config["number"]:
            return
        figure = f" at {this.last.balanced_accuracy:.3f}" if this.last else ""
        self._console.print(
            f"trial {this.number} {this.ended}{figure}; {self._summary()}; best {self._best()}",
            soft_wrap=True,
            highlight=False,
        )

    def _best(self) -> str:
        best = self._tally.best
        if best is None or best.last is None:
            return "none yet"
        return f"{best.last.balanced_accuracy:.3f} (trial {best.number}: {best.hyperparameters})"

    def _summary(self) -> str:
        elapsed = time.monotonic() - self._began
        done = self._tally.finished
        done_now = done - self._done_before
        left = f"{elapsed / done_now * (self._trials - done) / 60:.1f} min left" if done_now else "time left unknown"
        waiting = f", {self._clock.waiting} slots without room" if self._clock.waiting else ""
        return f"{done} of {self._trials} trials, {self._epochs / elapsed:.2f} epochs/s, {left}{waiting}"

    def _render(self) -> Group:
        return Group(
            ProgressBar(total=self._trials, completed=self._tally.finished, width=60),
            Text(f" {self._summary()}"),
            Text(f"best balanced accuracy on validation: {self._best()}"),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration, but a display cannot be moved to another process
