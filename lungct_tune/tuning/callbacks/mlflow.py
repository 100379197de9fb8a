"""Copies the study to MLflow, for users who keep their experiments there. The copy does not delay the search."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from rich.console import Console

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.display import print_prose
from lungct_tune.errors import UserError, first_line
from lungct_tune.experiment.metrics import TestMetrics
from lungct_tune.experiment.study import read_trials
from lungct_tune.experiment.trial import Outcome
from lungct_tune.training.objective import OBJECTIVE

PERIOD_S = 5
"""Seconds between updates of the copy."""

LAST_CHANCE_S = 30
"""How long a search waits at its end for the last update."""

TAG = "lungct_tune"
"""The tag with the trial of a run. Users may rename a run, but the tag stays."""


class TrackingError(UserError):
    """MLflow cannot be used. The message says where, why and what to do."""


@dataclass
class _Run:
    """The state of a trial's run in MLflow."""

    id: str
    described: bool
    epochs: int
    ended: bool


class MLflowTracker:
    """A copy of a study in MLflow: an experiment of its name, a run for each trial, and one for the final model.

    Each update compares the study with MLflow and adds what is missing there. So a trial that continues after an
    interruption continues in its run, and a server that was not available gets the missing data later.

    Args:
        track: `mlflow:` and the address of the server, http or https.
        name: the name of the study and of the experiment.
        new: whether the study is new, so that the experiment must not exist yet.

    Raises:
        TrackingError: MLflow is not installed, its server does not answer, or a new study's name is taken there.
    """

    def __init__(self, track: str, name: str, *, new: bool) -> None:
        # the next update tries again anyway, and MLflow's own seven retries would delay the end of a search for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        try:
            from mlflow import MlflowClient, MlflowException
        except ImportError as error:
            raise TrackingError(f"--track needs MLflow ({error}): uv pip install mlflow") from error
        uri = track.removeprefix("mlflow:")
        self._uri, self._name, self._client = uri, name, MlflowClient(uri)
        try:
            there = self._client.get_experiment_by_name(name)
        except MlflowException as error:
            raise TrackingError(
                f"MLflow at {uri} cannot be used: {first_line(error)}\nCheck --track, that its server runs, and, if "
                "it asks for them, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        if there and new:
            raise TrackingError(f"MLflow at {uri} has an experiment {name!r} already; choose another --name")
        self._experiment = ""
        self._runs: dict[str, _Run] | None = None
        self._final: tuple[dict[str, Any], dict[str, float]] | None = None

    @contextmanager
    def kept_up(self, study: optuna.Study, console: Console) -> Iterator[None]:
        """Keeps the copy up to date in a thread. Errors of MLflow do not stop the search."""
        over = threading.Event()
        thread = threading.Thread(target=self._keep_up, args=(study, console, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=LAST_CHANCE_S)
            if self._runs is None or thread.is_alive():
                print_prose(console, f"MLflow at {self._uri} did not receive the end of this search", "yellow")

    def add_final(self, trial: int, hyperparameters: Hyperparameters, epochs: int, test: TestMetrics) -> None:
        """Adds the final model and its test figures to the next update."""
        figures = {name: getattr(test, name).value for name in ("accuracy", "balanced_accuracy", "macro_f1")}
        if interval := test.accuracy.ci95:
            figures |= {"accuracy_ci95_low": interval[0], "accuracy_ci95_high": interval[1]}
        self._final = (
            {"trial": trial, "epochs": epochs} | hyperparameters.resolved.as_dict(),
            {f"test_{name}": value for name, value in figures.items()},
        )

    def _keep_up(self, study: optuna.Study, console: Console, over: threading.Event) -> None:
        complained = last = False
        while not last:
            last = over.wait(PERIOD_S)
            try:
                self._copy(study)
            except Exception as error:  # the search continues after any error
                self._runs = None  # it is not known which data have arrived
                if not complained:
                    why = f"does not accept the search's data ({first_line(error)})"
                    print_prose(console, f"MLflow at {self._uri} {why}. The search continues and tries again", "yellow")
                complained = True

    def _copy(self, study: optuna.Study) -> None:
        from mlflow.entities import Metric

        if self._runs is None:
            found = self._client.get_experiment_by_name(self._name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(self._name)
            self._runs = self._read_runs()
        ended = {int(name.removeprefix("trial_")) for name, run in self._runs.items() if run.ended and name != "final"}
        for trial in read_trials(study, without=ended):
            run = self._run(f"trial_{trial.number:04d}", trial.started, trial.hyperparameters.resolved.as_dict())
            for epoch in trial.history[run.epochs :]:
                now = _milliseconds(None)
                metrics = [Metric(name, value, now, run.epochs + 1) for name, value in epoch.curves().items()]
                self._client.log_batch(run.id, metrics)
                run.epochs += 1
            if trial.is_finished:
                figures = {f"last_{OBJECTIVE}": trial.last.balanced_accuracy} if trial.last else {}
                self._end(run, figures, trial.outcome, trial.ended, trial.completed)
        if self._final:
            parameters, figures = self._final
            self._end(self._run("final", None, parameters), figures, Outcome.COMPLETED, Outcome.COMPLETED.value, None)

    def _read_runs(self) -> dict[str, _Run]:
        """The runs that are there, by the names in their tags."""
        runs, token = {}, None
        while True:
            page = self._client.search_runs([self._experiment], max_results=1000, page_token=token)
            for run in page:
                if (name := run.data.tags.get(TAG)) is not None:  # others are the user's own
                    epochs, ended = int(run.data.metrics.get("epoch", 0)), run.info.status != "RUNNING"
                    runs[name] = _Run(run.info.run_id, bool(run.data.params), epochs, ended)
            if not (token := page.token):
                return runs

    def _run(self, name: str, began: datetime | None, parameters: Mapping[str, Any]) -> _Run:
        """The run of that name, with its parameters. Creates what is missing in MLflow."""
        from mlflow.entities import Param

        assert self._runs is not None
        if name not in self._runs:
            run = self._client.create_run(self._experiment, _milliseconds(began), {TAG: name}, run_name=name)
            self._runs[name] = _Run(run.info.run_id, described=False, epochs=0, ended=False)
        if not self._runs[name].described:
            params = [Param(key, str(value)) for key, value in parameters.items()]
            self._client.log_batch(self._runs[name].id, params=params)
            self._runs[name].described = True
        return self._runs[name]

    def _end(
        self, run: _Run, figures: Mapping[str, float], outcome: Outcome, ended: str, when: datetime | None
    ) -> None:
        if run.ended:
            return
        for name, value in figures.items():
            self._client.log_metric(run.id, name, value)
        self._client.set_tag(run.id, "ended", ended)
        status = "FINISHED" if outcome in (Outcome.COMPLETED, Outcome.STOPPED) else "FAILED"
        self._client.set_terminated(run.id, status, _milliseconds(when))
        run.ended = True


def _milliseconds(when: datetime | None) -> int:
    """A time in MLflow's unit, milliseconds; now, if Optuna has none."""
    return int((when or datetime.now()).timestamp() * 1000)
