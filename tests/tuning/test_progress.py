"""What a search shows of its trials: a table that fits the terminal, elsewhere a short line for each."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from trials import record, workload

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.display import Display, print_prose, tracked
from lungct_tune.experiment.trial import EpochCost, EpochReport, Outcome, TrialOrder, TrialRecord
from lungct_tune.tuning.callbacks.progress import ProgressCallback
from lungct_tune.tuning.slots import REPORT
from lungct_tune.tuning.tally import SearchTally
from lungct_tune.tuning.time_left import TimeLeft

EPOCHS = 9


class Shown:
    """A search of 60 trials, two at a time, whose display is in a text."""

    def __init__(self, width: int, height: int = 40, *, terminal: bool = True, earlier: tuple[TrialRecord, ...] = ()):
        self.console = Console(
            file=io.StringIO(), width=width, height=height, force_terminal=terminal, color_system=None
        )
        self.tally = SearchTally(record for record in earlier if record.is_finished)
        left = TimeLeft(workload(60, EPOCHS, (1, 3), slots=2), earlier)
        clock: Any = SimpleNamespace(waiting=0)
        display = Display(self.console)
        self.progress = ProgressCallback(self.tally, earlier, 60, EPOCHS, clock, left, display)

    def start(self, number: int, hyperparameters: Hyperparameters = PUBLISHED) -> Any:
        trial = SimpleNamespace(config={"order": TrialOrder(number, 0, hyperparameters)})
        self.progress.on_trial_start(0, [], trial)
        return trial

    def train(self, trial: Any, epochs: int, score: float) -> None:
        report = EpochReport(Outcome.RUNNING, record(0, epochs, score).history, EpochCost(epochs, 8, 0, 0.0))
        self.progress.on_trial_result(0, [], trial, {REPORT: report})

    def end(self, trial: Any, record: TrialRecord) -> None:
        self.tally.add(record)
        self.progress.on_trial_complete(0, [], trial)

    def lines(self) -> list[str]:
        with self.console.capture() as text:
            self.console.print(self.progress._render())
        return [line.rstrip() for line in text.get().splitlines()]


def row(lines: list[str], number: int) -> str:
    (found,) = [line for line in lines if line.split()[:1] == [str(number)] and "°" in line]
    return found


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_marks_the_published_the_best_and_those_that_run(width: int) -> None:
    shown = Shown(width)
    with shown.progress:
        trials = [shown.start(number) for number in range(3)]
        assert "starting" in row(shown.lines(), 1)
        for trial, epochs, score in zip(trials, (9, 9, 3), (0.5, 0.8125, 0.25), strict=True):
            shown.train(trial, epochs, score)
        shown.end(trials[0], record(0, 9, 0.5, Outcome.COMPLETED))
        shown.end(trials[1], record(1, 9, 0.8125, Outcome.COMPLETED))
        shown.end(shown.start(3), record(3, 1, 0.1, Outcome.STOPPED, "stopped early after epoch 1"))
        lines = shown.lines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert row(lines, 0).split() == ["0", "20", "0.50", "72°", "9/9", "0.500", "published,", "completed"]
    assert row(lines, 1).endswith("0.812  best, completed")
    assert row(lines, 2).endswith("running") and "━" in row(lines, 2) and "3/9" in row(lines, 2)
    assert row(lines, 3).endswith("stopped early")
    assert any(line.startswith("3 of 60 trials") for line in lines) and any("min left" in line for line in lines)


def test_of_many_trials_those_that_run_the_marked_and_the_last_are_shown() -> None:
    earlier = [record(number, 1, 0.3, Outcome.STOPPED) for number in range(2, 50)]
    earlier += [record(0, 9, 0.4, Outcome.COMPLETED), record(1, 9, 0.7, Outcome.COMPLETED)]
    shown = Shown(80, 24, earlier=tuple(earlier))
    shown.start(50), shown.start(51)
    lines = shown.lines()
    assert len(lines) <= 24 - 4
    for number in (0, 1, 49, 50, 51):
        assert row(lines, number)
    assert any("other trials are not shown" in line for line in lines)


def test_after_a_resume_what_is_known_is_shown_before_anything_has_run() -> None:
    earlier = (record(0, 4, 0.6, Outcome.RUNNING), record(1, 1, 0.2, Outcome.STOPPED))
    shown = Shown(80, earlier=earlier)
    lines = shown.lines()
    assert "4/9" in row(lines, 0) and row(lines, 0).endswith("published, continues")
    assert row(lines, 1).endswith("stopped early")
    assert any("left" in line and "known after" not in line for line in lines)
    shown.start(0)
    assert "4/9" in row(shown.lines(), 0)  # until it reports


def test_without_a_terminal_an_ended_trial_is_one_short_line() -> None:
    shown = Shown(80, terminal=False)
    with shown.progress:
        trial = shown.start(7)
        shown.train(trial, 3, 0.25)
        shown.end(trial, record(7, 3, 0.25, Outcome.STOPPED, "stopped early after epoch 3"))
    text = shown.console.file.getvalue()  # type: ignore[attr-defined]
    first, line = text.splitlines()
    assert first == "starting workers"
    assert line.startswith("trial 7 stopped early after epoch 3 at 0.250; 1 of 60; ") and line.endswith("min left")
    assert len(line) < 100


def test_a_trial_that_failed_is_shown_when_the_study_is_told_of_it() -> None:
    """Found: it had no line and no row, and the forecast went on with it as one that runs."""
    shown = Shown(80, terminal=False)
    with shown.progress:
        failing, other, last = (shown.start(number) for number in range(3))
        shown.train(failing, 1, 0.25)
        shown.progress.on_trial_complete(0, [], failing)  # the searcher waits until another has ended well
        shown.tally.add(record(0, 1, 0.25, Outcome.FAILED, "failed: the workers ended"))
        shown.end(other, record(1, 9, 0.5, Outcome.COMPLETED))
        shown.progress.on_trial_complete(0, [], last)
        shown.tally.add(record(2, 0, 0.0, Outcome.FAILED, "failed: the workers ended"))  # at the end of the search
    _, first, second, third = shown.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.startswith("trial 0 failed: the workers ended at 0.250; 1 of 60, ")
    assert second.startswith("trial 1 completed at 0.500; 2 of 60, ")
    assert third.startswith("trial 2 failed: the workers ended; 3 of 60, ")
    assert not shown.progress._left._running


def test_at_a_stop_it_says_at_once_where_each_trial_is_and_not_what_it_will_keep() -> None:
    shown = Shown(200, terminal=False)
    with shown.progress:
        for number in (9, 8, 7):
            shown.train(shown.start(number), number - 6, 0.3)
        shown.start(10)
        shown.progress.say_stopping()
    text = shown.console.file.getvalue()  # type: ignore[attr-defined]
    assert "stopping; trial 7 is at epoch 1, trial 8 is at epoch 2, trial 9 is at epoch 3. Ctrl-C again" in text
    shown = Shown(80)
    with shown.progress:
        shown.train(shown.start(7), 1, 0.3)
        assert any("min left" in line for line in shown.lines())
        shown.progress.say_stopping()
        assert not any("min left" in line for line in shown.lines()), "that is the time of a search that goes on"
    assert row(shown.console.file.getvalue().splitlines(), 7).endswith("interrupted")  # type: ignore[attr-defined]


def test_a_display_shows_steps_that_overlap_with_their_time_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Display(console) as display, display.step("reading"), display.step("starting Ray"):
        with console.capture() as text:
            console.print(display._render())
        assert [line.split(maxsplit=1)[1].rstrip() for line in text.get().splitlines() if line.strip()] == [
            "reading, 0 s",
            "starting Ray, 0 s",
        ]
        items = tracked(iter("abcd"), "Decoding images", 4, shown=True)
        assert next(items) == "a"
        with console.capture() as text:
            console.print(display._render())
        assert "Decoding images" in text.get() and "reading" in text.get()
        assert list(items) == ["b", "c", "d"]
        with console.capture() as text:
            console.print(display._render())
        assert "Decoding images" not in text.get()
    assert Display.open is None


def test_prose_is_broken_between_words_in_a_terminal_and_nowhere_else() -> None:
    path = "/a/folder/with-a-long-name" * 4
    text = f"  cluster    two slots of one worker each; the final retraining on one worker; kept in {path}\nthe end"
    shown, piped = (
        Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None) for terminal in (True, False)
    )
    for console in (shown, piped):
        print_prose(console, text, hang=13)
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-2].strip() == path and lines[-1] == "the end"
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert all(line.startswith(" " * 13) for line in lines[1:-1])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert piped.file.getvalue() == f"{text}\n"  # type: ignore[attr-defined]
