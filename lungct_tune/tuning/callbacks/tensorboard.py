"""Writes TensorBoard's events of each trial. Ray Tune's own callback writes only the last epoch of a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import hparams

from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochFigures, EpochReport
from lungct_tune.filesystem import StorageError
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.background import BackgroundThreads
from lungct_tune.tuning.callbacks import SearchCallback
from lungct_tune.tuning.slots import ORDER, REPORT

FOLDER = "tune"
"""In the experiment: a folder for each trial, with TensorBoard's events."""

FLUSH_S = 10
"""How late the files of running trials may be."""

PREFIX = "ray/tune/"
"""Of the tags, as Ray Tune names them."""


class TensorBoardCallback(SearchCallback):
    """Writes the figures of every epoch, and at a trial's end its hyperparameters, in a thread of its own.

    The files are in the experiment's folder on this machine. With remote storage they are uploaded when a trial ends.
    A context manager: at its end everything is written.

    Args:
        storage_threads: upload the files.
    """

    def __init__(self, experiment: Experiment, storage_threads: Executor) -> None:
        self._experiment, self._storage_threads = experiment, storage_threads
        self._thread = BackgroundThreads(1)
        self._writers: dict[str, EventsWriter] = {}
        """Used in that thread, and after its end."""
        self._flushed = time.monotonic()

    def __enter__(self) -> TensorBoardCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for name in list(self._writers):
            self._close(name)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        report: EpochReport = result[REPORT]
        if report.trained:  # others were drawn before
            self._thread.submit(self._write, str(trial), report.trained)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if time.monotonic() >= self._flushed + FLUSH_S:
            self._flushed = time.monotonic()
            self._thread.submit(lambda: [writer.flush() for writer in self._writers.values()])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        reached = trial.last_result.get(OBJECTIVE, 0.0) if trial.last_result else 0.0
        self._thread.submit(self._finish, str(trial), trial.config[ORDER].hyperparameters.as_dict(), reached)

    on_trial_error = on_trial_complete

    def _write(self, name: str, epochs: Sequence[EpochFigures]) -> None:
        if name not in self._writers:
            folder = self._experiment.local_folder / FOLDER / name
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[name] = EventsWriter(str(folder / "events"))
        for figures in epochs:
            values = [Summary.Value(tag=f"{PREFIX}{of}", simple_value=value) for of, value in figures.curves().items()]
            at = figures.at or time.time()
            self._writers[name].write_event(Event(wall_time=at, step=figures.epoch, summary=Summary(value=values)))

    def _finish(self, name: str, configuration: Mapping[str, Any], reached: float) -> None:
        if name not in self._writers:  # no epoch was run
            return
        chosen = {f"configuration/{of}": value for of, value in configuration.items() if value is not None}
        for summary in hparams(chosen, {f"{PREFIX}{OBJECTIVE}": reached}):
            self._writers[name].write_event(Event(wall_time=time.time(), summary=summary))
        self._close(name)

    def _close(self, name: str) -> None:
        self._writers.pop(name).close()
        if not self._experiment.is_local:
            self._storage_threads.submit(self._upload, name)

    def _upload(self, name: str) -> None:
        with suppress(StorageError):  # the files stay on this machine
            for file in (self._experiment.local_folder / FOLDER / name).iterdir():
                self._experiment.write(f"{FOLDER}/{name}/{file.name}", file.read_bytes())
