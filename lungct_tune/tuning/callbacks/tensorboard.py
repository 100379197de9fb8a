"""Writes TensorBoard's events of each trial. Ray Tune's own callback writes only the last epoch of a step."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from ray import tune
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport
from lungct_tune.filesystem import StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.slots import REPORT

FOLDER = "tune"
"""In the experiment: a folder for each trial, with TensorBoard's events."""

FLUSH_S = 10
"""How late the files of a running trial may be."""

PREFIX = "ray/tune/"
"""Of the tags, as Ray Tune names them."""


class TensorBoardCallback(tune.Callback):  # type: ignore[misc]
    """Writes the figures of every epoch, and at a trial's end its hyperparameters.

    The files are in the experiment's folder on this machine. With remote storage they are uploaded when a trial ends.

    Args:
        storage_threads: upload them, so that the search does not wait for it.
    """

    def __init__(self, experiment: Experiment, storage_threads: Executor) -> None:
        self._experiment, self._threads = experiment, storage_threads
        self._writers: dict[str, SummaryWriter] = {}

    def __enter__(self) -> TensorBoardCallback:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._writers):
            self._close(name)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        report: EpochReport = result[REPORT]
        new = [figures for figures in report.epochs if figures.slot is not None]  # others were drawn before
        if not new:
            return
        name = str(trial)
        if name not in self._writers:
            folder = str(self._experiment.local_folder / FOLDER / name)
            self._writers[name] = SummaryWriter(folder, flush_secs=FLUSH_S)
        for figures in new:
            for what, value in figures.as_dict().items():
                self._writers[name].add_scalar(f"{PREFIX}{what}", value, figures.epoch)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial)

    def _end(self, trial: Any) -> None:
        if (name := str(trial)) not in self._writers:
            return
        configuration: Mapping[str, Any] = trial.config["configuration"]
        chosen = {f"configuration/{what}": value for what, value in configuration.items() if value is not None}
        reached = {f"{PREFIX}{OBJECTIVE}": trial.last_result.get(OBJECTIVE, 0.0)}
        for summary in hparams(chosen, reached):
            self._writers[name].file_writer.add_summary(summary)
        self._close(name)

    def _close(self, name: str) -> None:
        self._writers.pop(name).close()
        if not self._experiment.is_local:
            self._threads.submit(self._upload, name)

    def _upload(self, name: str) -> None:
        with suppress(StorageError):  # they stay on this machine
            for file in (self._experiment.local_folder / FOLDER / name).iterdir():
                self._experiment.write(f"{FOLDER}/{name}/{file.name}", file.read_bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its configuration, but open files cannot be moved to another process
