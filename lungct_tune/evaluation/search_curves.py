"""Compares searches on the same validation images: the best figure so far, by trials and by hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from lungct_tune.errors import UserError
from lungct_tune.experiment.results import SearchResults
from lungct_tune.experiment.trial import Outcome, TrialRecord

PAUSE_S = 120.0
"""If no trial was inside an epoch for longer than this, the search was interrupted. Interruptions do not count as time
of the search."""

LADDER_S = (10, 30, 60, 120, 240, 480, 900, 1800, *(3600 * 2**k for k in range(11)))
"""Seconds after which searches are compared."""

STEPS = 8
"""After so many of these times at most, the longest ones."""


@dataclass(frozen=True, eq=False)
class SearchCurve:
    """The best validation figure of a search after each of its trials."""

    name: str
    results: SearchResults
    best: tuple[float | None, ...]
    """The balanced accuracy of the best trial that ran to its end, among the first 1, 2, 3, ... trials that ended;
    None before the first."""
    seconds: tuple[float, ...] | None
    """The time of the search at the end of each of these trials; None if the study has no times."""

    @property
    def trials(self) -> int:
        """How many trials have ended."""
        return len(self.best)

    def after_trials(self, n: int) -> float | None:
        """The best figure after `n` trials; None if not so many have ended, or none of them ran to its end."""
        return self.best[n - 1] if 1 <= n <= self.trials else None

    def after_seconds(self, seconds: float) -> float | None:
        """The best figure after a time; None if the search is shorter or no trial had run to its end."""
        if self.seconds is None or seconds > self.seconds[-1]:
            return None
        return self.after_trials(sum(end <= seconds for end in self.seconds))


def search_curve(name: str, results: SearchResults) -> SearchCurve:
    """The curve of a search, finished or not.

    Raises:
        UserError: no trial has run to its end.
    """
    if results.winner is None:
        raise UserError(f"{name} cannot be compared: none of its trials has run to its end yet")
    ended = sorted(
        (trial for trial in results.trials if trial.is_finished),
        key=lambda trial: (trial.completed.timestamp() if trial.completed else 0.0, trial.number),
    )
    scores = [trial.last.balanced_accuracy if _counts(trial) and trial.last else 0.0 for trial in ended]
    counted = accumulate(map(_counts, ended))
    best = tuple(score if n else None for score, n in zip(accumulate(scores, max), counted, strict=True))
    return SearchCurve(name, results, best, _seconds(results.trials, ended))


def check_comparable(curves: Sequence[SearchCurve]) -> None:
    """Checks that the trials of all searches were evaluated on the same images.

    Raises:
        UserError: they were not; the message says what differs.
    """
    first = curves[0]
    for other in curves[1:]:
        if difference := _difference(first.results, other.results):
            raise UserError(
                f"the validation figures of {first.name} and {other.name} cannot be compared: {difference}. If their "
                "test images are the same, their final models can be compared: give the folder best of each search"
            )


def trial_steps(curves: Sequence[SearchCurve]) -> list[int]:
    """1, 2, 4, 8, ..., up to the trials of the longest search."""
    longest = max(curve.trials for curve in curves)
    return [2**k for k in range(longest.bit_length())]


def time_steps(curves: Sequence[SearchCurve]) -> list[int]:
    """The times, in seconds, after which the searches are compared."""
    longest = max((curve.seconds[-1] for curve in curves if curve.seconds), default=0.0)
    return [seconds for seconds in LADDER_S if seconds <= longest][-STEPS:]


def _counts(trial: TrialRecord) -> bool:
    return trial.outcome is Outcome.COMPLETED and trial.last is not None


def _seconds(trials: Sequence[TrialRecord], ended: Sequence[TrialRecord]) -> tuple[float, ...] | None:
    """The time of the search at the end of each trial, without interruptions."""
    epochs = [epoch for trial in trials for epoch in trial.history]
    spans = sorted((epoch.at - epoch.seconds, epoch.at) for epoch in epochs if epoch.at is not None)
    if len(spans) < len(epochs):
        return None  # of version 0.1, which kept no times
    runs: list[list[float]] = []
    for began, end in spans:
        if runs and began <= runs[-1][1] + PAUSE_S:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([began, end])
    began_R, end_R = np.array(runs).T
    last = [trial.last.at if trial.last and trial.last.at else 0.0 for trial in ended]
    return tuple(float(np.clip(at - began_R, 0, end_R - began_R).sum()) for at in accumulate(last, max))


def _difference(one: SearchResults, other: SearchResults) -> str:
    """What differs in the images that trials were evaluated on; "" if nothing does."""
    if one.judged != other.judged:
        return f"trials were evaluated {one.judged} and {other.judged}"
    sizes = [str(results.settings["image_size"]) for results in (one, other)]
    if sizes[0] != sizes[1]:
        return f"the images were read at {' and '.join(sizes)} pixels"
    if one.settings["fingerprint"] != other.settings["fingerprint"]:
        return "the images, their classes, their groups or their window differ (fingerprint in settings.yaml)"
    ours, theirs = _places(one), _places(other)
    if moved := sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)):
        return (
            f"their splits differ. {len(moved)} images are in another part or fold, such as {moved[0]}; --split, "
            "--split-seed, --split-file and --folds must be the same"
        )
    return ""


def _places(results: SearchResults) -> dict[str, tuple[str, ...]]:
    """Class, part of the split and fold of each image, by path."""
    columns = results.split.columns.intersection(["label", "split", "fold"])
    places = results.split[columns].astype(str).itertuples(index=False, name=None)
    return dict(zip(results.split["path"], places, strict=True))
