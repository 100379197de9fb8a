"""Shows the progress of a search: a table of its trials in a terminal, elsewhere a line for each finished trial."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.display import Display, print_prose
from lungct_tune.experiment.trial import BASELINE, EpochReport, Outcome, TrialRecord
from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.callbacks.clock import SlotTimeCallback
from lungct_tune.tuning.slots import ORDER, REPORT
from lungct_tune.tuning.tally import SearchTally
from lungct_tune.tuning.time_left import TimeLeft

OTHER_LINES = 16
"""Lines of the terminal that are not for trials: the table's own, the summary, the steps, and some of what is above."""

FEWEST_ROWS, MOST_ROWS = 4, 40

BAR_WIDTH, BAR_WIDTH_WHERE_NARROW = 20, 8
"""Of the bar of a trial: the second in a terminal of 80 columns."""

NARROW = 100


@dataclass
class _Running:
    """A trial that runs, as far as it has reported, or one that an interruption left running."""

    hyperparameters: Hyperparameters
    epoch: int = 0
    score: float | None = None
    state: str = "starting"


def _interrupted(record: TrialRecord) -> _Running:
    last = record.last
    score = last.balanced_accuracy if last else None
    return _Running(record.hyperparameters, len(record.history), score, "continues")


class ProgressCallback(SearchCallback):
    """Shows the trials of a search, how many have ended, the best one, and the time left.

    Args:
        records: the trials that have begun before this run.
        trials: how many the search will have.
        epochs: of a trial that is not stopped.
    """

    def __init__(
        self,
        tally: SearchTally,
        records: Sequence[TrialRecord],
        trials: int,
        epochs: int,
        clock: SlotTimeCallback,
        left: TimeLeft,
        display: Display,
    ) -> None:
        self._tally, self._trials, self._epochs = tally, trials, epochs
        self._clock, self._left, self._display = clock, left, display
        self._running: dict[int, _Running] = {}
        self._published: TrialRecord | None = None
        self._last: deque[TrialRecord] = deque(maxlen=MOST_ROWS)
        for record in records:
            if record.is_finished:
                self._add(record)
            else:
                self._running[record.number] = _interrupted(record)
                left.add(record.number, record.hyperparameters, len(record.history), ())
        self._held, self._stops = ExitStack(), False

    def __enter__(self) -> ProgressCallback:
        self._note_ended()
        self._held.enter_context(self._display.showing(self._render))
        self._starting = self._held.enter_context(ExitStack())
        self._starting.enter_context(self._display.step("starting workers"))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self._note_ended()
        if self._stops:
            for trial in self._running.values():
                trial.state = "interrupted"
        if self._display.console.is_terminal:
            self._display.console.print(self._table(MOST_ROWS))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        order = trial.config[ORDER]
        self._running.setdefault(order.number, _Running(order.hyperparameters))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._starting.close()
        report: EpochReport = result[REPORT]
        number = trial.config[ORDER].number
        if report.epochs and number in self._running:
            last, running = report.epochs[-1], self._running[number]
            running.epoch, running.score, running.state = last.epoch, last.balanced_accuracy, "running"
            seconds = [figures.seconds for figures in report.trained]
            self._left.add(number, running.hyperparameters, last.epoch, seconds)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._running.pop(trial.config[ORDER].number, None)
        self._note_ended()

    on_trial_error = on_trial_complete

    def say_stopping(self) -> None:
        """Says that the search stops, and where the trials that run are.

        What they keep is known later: at a rung, and where the storage refuses, it is an older state.
        """
        at = [f"trial {n} is at epoch {trial.epoch}" for n, trial in sorted(self._running.items()) if trial.epoch]
        more = [f"{len(at) - 3} others run"] if len(at) > 3 else []
        text = f"stopping; {', '.join([*at[:3], *more]) or 'no trial has ended an epoch'}"
        self._stops = True
        print_prose(self._display.console, f"{text}. Ctrl-C again ends it without waiting", "yellow")
        self._held.enter_context(self._display.step("saving the states of the trials that run"))

    def _note_ended(self) -> None:
        """Shows the trials that the study has been told of: when one ends well, also those that failed before it."""
        while self._tally.new:
            this = self._tally.new.popleft()
            self._running.pop(this.number, None)
            self._add(this)
            self._left.end(this)
            if not self._display.console.is_terminal:
                figure = f" at {this.last.balanced_accuracy:.3f}" if this.last else ""
                best = self._tally.best
                best_so_far = (
                    f", best {best.last.balanced_accuracy:.3f} (trial {best.number})" if best and best.last else ""
                )
                text = f"trial {this.number} {this.ended}{figure}; {self._counts()}{best_so_far}; {self._left}"
                self._display.console.print(text, soft_wrap=True)

    def _add(self, record: TrialRecord) -> None:
        self._last.append(record)
        if record.number == BASELINE:
            self._published = record

    def _counts(self) -> str:
        return f"{self._tally.finished - len(self._tally.new)} of {self._trials}"

    def _render(self) -> RenderableType:
        rows = min(MOST_ROWS, max(FEWEST_ROWS, self._display.console.height - OTHER_LINES))
        waiting = f"; {self._clock.waiting} slots wait for room (`ray status`)" if self._clock.waiting else ""
        summary = Text(f"{self._counts()} trials{waiting}")
        return Group(self._table(rows), summary, *([] if self._stops else [self._left.bar()]))

    def _table(self, rows: int) -> Table:
        """The trials that run, the published configuration, the best, and the last that have ended, as far as fit."""
        table = Table(box=None, pad_edge=False, title_justify="left", header_style="dim")
        for title in ("trial", "depth", "dropout", "rotation", "epochs", "balanced\naccuracy"):
            table.add_column(title, justify="right", no_wrap=True, min_width=max(map(len, title.splitlines())))
        table.add_column("", no_wrap=True, ratio=1, overflow="ellipsis")
        running, best = dict(self._running), self._tally.best
        marked = [record for record in (self._published, best) if record is not None]
        latest = [record for record in reversed(list(self._last)) if record not in marked]
        ended = [*marked, *latest][: max(len(marked), rows - len(running))]
        shown: dict[int, TrialRecord | _Running] = {record.number: record for record in ended}
        shown |= dict(list(running.items())[: max(1, rows - len(shown))])
        for number, trial in sorted(shown.items()):
            names = ["published"] * (number == BASELINE) + ["best"] * (best is not None and number == best.number)
            if isinstance(trial, TrialRecord):
                epoch, score = len(trial.history), trial.last and trial.last.balanced_accuracy
                how = trial.outcome.value if trial.outcome is Outcome.STOPPED else trial.ended
                end: RenderableType = Text(", ".join([*names, how]))
            else:
                epoch, score = trial.epoch, trial.score
                end = Table.grid(padding=(0, 1))
                width = BAR_WIDTH_WHERE_NARROW if self._display.console.width < NARROW else BAR_WIDTH
                state = ", ".join([*names, trial.state])
                end.add_row(ProgressBar(total=self._epochs, completed=epoch, width=width), Text(state))
            values = trial.hyperparameters
            table.add_row(
                *(
                    str(number),
                    str(values.truncation_depth),
                    f"{values.dropout:.2f}",
                    f"{values.resolved.rotation:.0f}°",
                ),
                *(f"{epoch}/{self._epochs}", "" if score is None else f"{score:.3f}", end),
                style="bold green" if "best" in names else None,
            )
        hidden = self._tally.finished + len(running) - len(shown)
        if hidden > 0:
            table.caption, table.caption_justify = f"{hidden} other trials are not shown", "left"
        return table
