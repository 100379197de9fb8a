"""Writes the best trial so far as a bundle, for users who pull before the search has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from threading import Lock
from typing import Any

from lungct_tune.experiment.bundle import write_so_far
from lungct_tune.experiment.folder import TRIAL_WEIGHTS, Experiment, trial_folder
from lungct_tune.experiment.trial import TrialRecord
from lungct_tune.filesystem import StorageError
from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.tally import SearchTally


class BestSoFarCallback(SearchCallback):
    """Writes a bundle to `so_far/` whenever another completed trial becomes the best.

    Args:
        storage_threads: write it, so that the search does not wait for it.
        files: makes the bundle's files from a trial and its weights (safetensors).
    """

    def __init__(
        self,
        tally: SearchTally,
        experiment: Experiment,
        storage_threads: Executor,
        files: Callable[[TrialRecord, bytes], Mapping[str, bytes]],
    ) -> None:
        self._tally, self._experiment, self._threads, self._files = tally, experiment, storage_threads, files
        self._kept: int | None = None
        self._one_at_a_time = Lock()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self._tally.best is not None and self._tally.best.number != self._kept:
            self._threads.submit(self._write)

    def _write(self) -> None:
        with self._one_at_a_time:
            best, finished = self._tally.best, self._tally.finished
            if best is None or best.number == self._kept:
                return
            with suppress(StorageError, OSError):  # no reason to end the search: tried again after the next trial
                weights = self._experiment.read(f"{trial_folder(best.number)}/{TRIAL_WEIGHTS}")
                if weights is not None:
                    write_so_far(self._experiment, self._files(best, weights), finished)
                    self._kept = best.number
