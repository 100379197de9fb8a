"""Counts of a search, and its best trials, kept up to date as trials end. So nothing reads all trials at each end."""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterable

from lungct_tune.experiment.trial import BASELINE, KEPT_TRIALS, Outcome, TrialRecord


class SearchTally:
    """What is known of the trials that have ended.

    Args:
        finished: the trials that have ended before.
    """

    def __init__(self, finished: Iterable[TrialRecord]) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.best: TrialRecord | None = None
        """As `best_trial` of the trials."""
        self.new: deque[TrialRecord] = deque()
        """Those that have ended since; the display takes them from here."""
        self._kept: list[tuple[tuple[float, float], int]] = []
        """Rank and negative number of the best trials, which keep their weights, the best one last.

        Without the published configuration, which keeps them too: it is calibrated when it is compared."""
        for trial in finished:
            self.add(trial)
        self.new.clear()

    @property
    def finished(self) -> int:
        """How many trials have ended."""
        return self.outcomes.total()

    @property
    def weights_from(self) -> tuple[float, float] | None:
        """The rank from which a trial's weights are kept; None while there are fewer than `KEPT_TRIALS`."""
        return self._kept[0][0] if len(self._kept) >= KEPT_TRIALS else None

    def add(self, trial: TrialRecord) -> int | None:
        """Counts a trial that has ended.

        Returns:
            The number of the trial whose weights are not kept any more, which may be this one; None if all are kept.
        """
        self.outcomes[trial.outcome] += 1
        self.new.append(trial)
        if trial.outcome is not Outcome.COMPLETED or trial.last is None:
            return trial.number
        place = (trial.last.rank, -trial.number)
        if self.best is None or self.best.last is None or place > (self.best.last.rank, -self.best.number):
            self.best = trial
        if trial.number == BASELINE:
            return None
        bisect.insort(self._kept, place)
        return -self._kept.pop(0)[1] if len(self._kept) > KEPT_TRIALS else None
