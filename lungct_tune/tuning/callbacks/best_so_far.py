"""Writes the best trial so far as a bundle, for users who pull before the search has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import optuna
from ray import tune

from lungct_tune.experiment.bundle import write_so_far
from lungct_tune.experiment.folder import Experiment, trial_folder
from lungct_tune.experiment.study import finished_trials
from lungct_tune.experiment.trial import TrialRecord, best_trial
from lungct_tune.filesystem import StorageError


class BestSoFarCallback(tune.Callback):  # type: ignore[misc]
    """Writes a bundle to `so_far/` whenever another completed trial becomes the best.

    Args:
        files: makes the bundle's files from a trial and its weights (safetensors).
    """

    def __init__(
        self,
        study: optuna.Study,
        experiment: Experiment,
        files: Callable[[TrialRecord, bytes], Mapping[str, bytes]],
    ) -> None:
        self._study, self._experiment, self._files = study, experiment, files
        self._kept: int | None = None

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        finished = finished_trials(self._study)
        best = best_trial(finished)
        if best is None or best.number == self._kept:
            return
        with suppress(StorageError, OSError):  # no reason to end the search: tried again after the next trial
            weights = self._experiment.read(f"{trial_folder(best.number)}/best.safetensors")
            if weights is not None:
                write_so_far(self._experiment, self._files(best, weights), len(finished))
                self._kept = best.number

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration, but nothing reads it
