"""Watching a search: what Ray's dashboard, Prometheus, TensorBoard, MLflow and optuna-dashboard show of one."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import REPOSITORY
from optuna.trial import TrialState
from processes import searching, wait_for
from rich.console import Console
from services import get, server
from studies import epochs_of, trials_in

from lungct_tune.config.hyperparameters import PUBLISHED, Hyperparameters
from lungct_tune.experiment.study import rungs
from lungct_tune.experiment.trial import EpochFigures
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.callbacks.mlflow import MLflowTracker, TrackingError

pytestmark = [pytest.mark.long, pytest.mark.ray]

SPACE = """
truncation_depth: {low: 1, high: 8}
backbone_lr: {low: 1e-4, high: 1e-2, log: true}
fixed_trials: [{truncation_depth: 4}]
"""
EPOCHS, BATCH = 8, 8
STEPS = len({*rungs(EPOCHS), EPOCHS})
"""The fewest steps of a whole trial."""
DISCOVERY = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "prom_metrics_service_discovery.json")
GRAFANA = REPOSITORY / "clusters" / "grafana-dashboard.json"

Ask = Callable[[str], list[dict[str, Any]]]


@dataclass
class Watched:
    """A search that was killed in its middle and resumed, and what there was to see before that."""

    folder: Path
    jobs: list[Any]
    actors: list[Any]
    tasks: list[Any]
    optuna_epochs: list[int]
    """Epochs that optuna-dashboard showed, asked twice."""
    metrics: set[str]
    """The names that Prometheus had when every expression of the Grafana dashboard had a value."""
    ended_before: set[int]
    """Trials that had ended when the search was killed."""
    interrupted: set[int]
    """Trials that were in their middle."""

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in trials_in(self.folder, "watched") if trial.state.is_finished()]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    folder = tmp_path_factory.mktemp("mlflow")
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *store]
    with server(lambda port: [*command, "--port", str(port)], "/health") as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask | None]:
    """Asks a Prometheus that scrapes what Ray lists for it; None where Prometheus is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    ray_nodes = {"job_name": "ray", "file_sd_configs": [{"files": [str(DISCOVERY)], "refresh_interval": "1s"}]}
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [ray_nodes]}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}"]
    with server(lambda port: [*command, f"--web.listen-address=127.0.0.1:{port}"], "/-/ready") as (url, _):

        def ask(expression: str) -> list[dict[str, Any]]:
            query = urllib.parse.urlencode({"query": expression})
            return list(json.loads(get(f"{url}/api/v1/query?{query}"))["data"]["result"])

        yield ask


@pytest.fixture(scope="module")
def watched(
    mlflow_server: tuple[str, Any], prometheus: Ask | None, phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    from ray.util.state import list_actors, list_jobs, list_tasks

    storage = tmp_path_factory.mktemp("storage")
    folder = storage / "watched"
    (storage / "space.yaml").write_text(SPACE)
    new = ["--name", "watched", "--data", str(phantoms), "--space", str(storage / "space.yaml"), "--slots", "2"]
    new += ["--image-size", "64", "--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--checkpoint-interval", "0"]
    watch = ["--storage", str(storage), "--track", f"mlflow:{mlflow_server[0]}"]
    with searching(*new, "--weights", "none", "--trials", "99", *watch) as run:
        wait_for(lambda: epochs_in(folder, TrialState.COMPLETE), run)
        optuna_epochs = look_twice_with_optuna_dashboard(folder, run)
        metrics = set()
        if prometheus is not None:
            wait_for(
                lambda: len(prometheus("ray_lungct_epoch_seconds")) == 2 and all(map(prometheus, expressions())), run
            )
            metrics = {metric["metric"]["__name__"] for metric in prometheus('{__name__=~"ray_lungct_.+"}')}
        wait_for(lambda: mlflow_runs(mlflow_server[0], "attributes.status = 'RUNNING' AND metrics.epoch >= 1"), run)
        tasks: list[Any] = []

        def known() -> bool:
            job = next(job.job_id for job in list_jobs(detail=True) if job.metadata.get("job_name") == "watched")
            of_it = [("job_id", "=", job)]  # of all tasks of a long session no list has room
            tasks[:] = list_tasks(filters=of_it, detail=True, limit=10_000, raise_on_missing_output=False)
            return sum(task.name.startswith("trial 0: ") for task in tasks) >= STEPS

        wait_for(known, run)  # Ray hears of tasks a little later
        jobs, actors = list_jobs(detail=True), list_actors(detail=True, limit=10_000)
        wait_for(lambda: epochs_in(folder, TrialState.RUNNING), run)
        run.kill()
        run.wait()
    interrupted = epochs_in(folder, TrialState.RUNNING)
    ended = epochs_in(folder, TrialState.COMPLETE) | epochs_in(folder, TrialState.PRUNED)
    trials = len(ended) + len(interrupted) + 1
    with searching("--resume", "watched", "--trials", str(trials), *watch) as run:
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    return Watched(folder, jobs, actors, tasks, optuna_epochs, metrics, ended, interrupted)


# ---- Ray's dashboard ----------------------------------------------------------------------------------


def test_rays_dashboard_names_the_search_its_slots_and_the_trials_that_they_run(watched: Watched) -> None:
    assert [job.metadata for job in watched.jobs if job.metadata.get("job_name") == "watched"]
    alive = [actor for actor in watched.actors if actor.state == "ALIVE"]
    assert {actor.repr_name for actor in alive} >= {"watched slot 1", "watched slot 2", "watched mailbox"}
    shown = Counter(task.name for task in watched.tasks if task.name.startswith("trial "))
    completed = next(trial for trial in watched.trials if trial.state == TrialState.COMPLETE)
    assert (completed.number, completed.user_attrs["configuration"]["truncation_depth"]) == (0, 20)
    (published,) = [name for name in shown if name.startswith("trial 0: depth 20, 0 frozen, dropout 0.50")]
    assert STEPS <= shown[published] <= EPOCHS  # a task for each step


# ---- Prometheus and Grafana ---------------------------------------------------------------------------


def test_prometheus_has_the_figures_that_the_study_has(watched: Watched, prometheus: Ask | None) -> None:
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    metrics = json.loads((watched.folder / "best" / "metrics.json").read_text())
    by_state = latest(prometheus, "ray_lungct_trials", "state")
    assert {state: count for state, count in by_state.items() if count} == metrics["search"]["ended"]
    best = latest(prometheus, "ray_lungct_best_balanced_accuracy_ratio")
    assert best == pytest.approx({"": metrics["best_trial"][OBJECTIVE]})  # of 15 digits in the bundle
    share = latest(prometheus, "ray_lungct_training_time_ratio")
    assert 1 / share[""] == pytest.approx(metrics["search"]["overhead_ratio"], rel=0.3)

    epochs = [epoch for trial in watched.trials for epoch in epochs_of(trial)]
    with (watched.folder / "split.csv").open() as file:
        images = sum(row["split"] == "train" for row in csv.DictReader(file)) // BATCH * BATCH
    seconds = latest(prometheus, "ray_lungct_epoch_seconds", "slot")
    assert set(seconds) == {"1", "2"}
    assert set(seconds.values()) <= {epoch["train_s"] + epoch["valid_s"] for epoch in epochs}
    speed = latest(prometheus, "ray_lungct_images_per_second", "slot")
    assert set(speed.values()) <= {images / epoch["train_s"] for epoch in epochs}

    weights = sum(file.stat().st_size for file in watched.folder.glob("trials/*/model.safetensors"))
    assert value_of(prometheus("sum(ray_lungct_checkpoint_bytes_total)")) > weights
    slots_s = 2 * metrics["search"]["wall_s"]
    assert 0 < value_of(prometheus("sum(ray_lungct_checkpoint_seconds_total)")) < slots_s


def test_the_grafana_dashboard_draws_every_metric_and_none_that_is_not_there(
    watched: Watched, prometheus: Ask | None
) -> None:
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    assert set(re.findall(r"ray_lungct_\w+", " ".join(expressions()))) == watched.metrics


# ---- TensorBoard --------------------------------------------------------------------------------------


def test_tensorboards_files_have_every_trials_epochs_and_hyperparameters(watched: Watched) -> None:
    """A trial that was interrupted has a second file, which goes on with the numbers of its epochs."""
    for trial in watched.trials:
        files = sorted((watched.folder / "tune" / f"trial_{trial.number:04d}").glob("events.out.tfevents.*"))
        parts = [scalars(file, f"ray/tune/{OBJECTIVE}") for file in files]
        drawn = {step: value for part in parts for step, value in part.items()}
        known = trial.intermediate_values
        assert drawn == pytest.approx({step: known[step] for step in drawn})
        if trial.number not in watched.ended_before:  # what the driver wrote just before it was killed is lost
            first = min(parts[-1])
            assert first > 1 or trial.number not in watched.interrupted
            assert set(parts[-1]) == set(range(first, max(known) + 1))
            depth = hyperparameters(files[-1])["configuration/truncation_depth"]
            assert depth == trial.user_attrs["configuration"]["truncation_depth"]


def scalars(file: Path, tag: str) -> dict[int, float]:
    return {event.step: v.simple_value for event in events(file) for v in event.summary.value if v.tag == tag}


def hyperparameters(file: Path) -> dict[str, float]:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for event in events(file):
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                return {name: v.number_value for name, v in content.session_start_info.hparams.items()}
    return {}


def events(file: Path) -> Iterator[Any]:
    """TensorBoard's records: a length of 8 bytes, its checksum of 4, the event, and its checksum of 4."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


# ---- optuna-dashboard ---------------------------------------------------------------------------------


def test_optuna_dashboard_shows_the_study_grow(watched: Watched) -> None:
    before, after = watched.optuna_epochs
    assert 0 < before < after


def look_twice_with_optuna_dashboard(folder: Path, run: subprocess.Popen[str]) -> list[int]:
    command = [str(Path(sys.executable).parent / "optuna-dashboard"), f"{folder}/study.journal"]
    with server(lambda port: [*command, "--port", str(port)], "/api/studies") as (url, _):
        (study,) = json.loads(get(f"{url}/api/studies"))["study_summaries"]
        assert study["study_name"] == folder.name

        def shown() -> int:
            trials = json.loads(get(f"{url}/api/studies/{study['study_id']}?after=0"))["trials"]
            return sum(len(trial["intermediate_values"]) for trial in trials)

        before = shown()
        wait_for(lambda: shown() > before, run)
        return [before, shown()]


# ---- MLflow -------------------------------------------------------------------------------------------


def test_mlflow_has_a_run_for_each_trial_and_one_for_the_final_model(watched: Watched, mlflow_server: Any) -> None:
    url, _ = mlflow_server
    runs = {run.info.run_name: run for run in mlflow_runs(url)}
    assert len(mlflow_runs(url)) == len(watched.trials) + 1
    for trial in watched.trials:
        run = runs[f"trial_{trial.number:04d}"]
        configuration = Hyperparameters(**trial.user_attrs["configuration"]).resolved
        assert run.data.params == {name: str(value) for name, value in configuration.as_dict().items()}
        assert mlflow_history(url, run, OBJECTIVE) == sorted(trial.intermediate_values.items())  # also the interrupted
        assert run.data.tags["ended"] == trial.user_attrs["ended"] and run.info.status == "FINISHED"
    metrics = json.loads((watched.folder / "best" / "metrics.json").read_text())
    assert runs["final"].data.metrics["test_accuracy"] == metrics["test"]["accuracy"]["value"]
    assert runs["final"].data.params["trial"] == str(metrics["best_trial"]["trial"])


def test_a_name_that_mlflow_has_already_is_refused(mlflow_server: Any) -> None:
    url, _ = mlflow_server
    client_of(url).create_experiment("taken")
    with pytest.raises(TrackingError, match="has an experiment 'taken' already; choose another --name"):
        MLflowTracker(f"mlflow:{url}", "taken", new=True)
    MLflowTracker(f"mlflow:{url}", "taken", new=False)


def test_a_server_that_stalls_is_said_once_and_hears_later_what_it_missed(
    mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, process = mlflow_server
    monkeypatch.setattr("lungct_tune.tuning.callbacks.mlflow.PERIOD_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="stalled")
    trial = study.ask()
    trial.set_user_attr("configuration", PUBLISHED.as_dict())
    console = Console(record=True, width=400, file=io.StringIO())

    def train(*scores: float) -> None:
        epochs = [
            EpochFigures(
                epoch=n, balanced_accuracy=score, accuracy=0.5, log_loss=1.0, train_loss=1.0, train_s=1.0, valid_s=0.1
            )
            for n, score in enumerate(scores, start=1)
        ]
        trial.set_user_attr("history", [figures.as_dict() for figures in epochs])

    def at_mlflow() -> list[tuple[int, float]]:
        return [figures for run in mlflow_runs(url, name="stalled") for figures in mlflow_history(url, run, OBJECTIVE)]

    with MLflowTracker(f"mlflow:{url}", "stalled", new=True).kept_up(study, console):
        train(0.25)
        wait_for(lambda: at_mlflow() == [(1, 0.25)])
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            train(0.25, 0.5)
            wait_for(lambda: "does not accept the search's data" in console.export_text(clear=False))
            time.sleep(3)  # it is tried again, and not said again
        finally:
            os.killpg(process.pid, signal.SIGCONT)
        wait_for(lambda: at_mlflow() == [(1, 0.25), (2, 0.5)])
        os.killpg(process.pid, signal.SIGSTOP)
        train(0.25, 0.5, 0.5)
        began = time.monotonic()
    os.killpg(process.pid, signal.SIGCONT)
    assert time.monotonic() - began < 20
    said = console.export_text()
    assert said.count("does not accept the search's data") == said.count("did not receive the end of this search") == 1


def client_of(url: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(url)


def mlflow_runs(url: str, which: str = "", name: str = "watched") -> list[Any]:
    client = client_of(url)
    found = client.get_experiment_by_name(name)
    return list(client.search_runs([found.experiment_id], which)) if found else []


def mlflow_history(url: str, run: Any, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client_of(url).get_metric_history(run.info.run_id, metric))


# ---- the study, Prometheus ---------------------------------------------------------------------------


def epochs_in(folder: Path, state: TrialState) -> set[int]:
    """The numbers of the trials in that state of which the study knows an epoch."""
    trials = trials_in(folder, "watched")
    return {trial.number for trial in trials if trial.state == state and trial.intermediate_values}


def expressions() -> list[str]:
    """The Grafana dashboard's, as Prometheus takes them."""
    panels = json.loads(GRAFANA.read_text())["panels"]
    written = [target["expr"] for panel in panels for target in panel["targets"]]
    return [one.replace("$search", "watched").replace("$__rate_interval", "1m") for one in written]


def latest(ask: Ask, metric: str, label: str = "") -> dict[str, float]:
    """A metric's last values by a label; those of the resumed search where there are two."""
    series = ask(f'{metric}{{search="watched"}}[1h]')
    series.sort(key=lambda one: one["values"][-1][0])
    return {one["metric"].get(label, ""): float(one["values"][-1][1]) for one in series}


def value_of(result: list[dict[str, Any]]) -> float:
    (one,) = result
    return float(one["value"][1])
