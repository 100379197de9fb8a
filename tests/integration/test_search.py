"""The main job, as a user runs it: real Ray, real workers, phantoms from the disk."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import signal
import sqlite3
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest
from conftest import CT_IMAGES, CT_WEIGHTS, SMALL, SPACE
from optuna.trial import TrialState
from processes import searching, wait_for

from lungct_tune.search import main
from lungct_tune.training.objective import OBJECTIVE

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("cluster")

SLOW = ["--image-size", "96", "--epochs", "8"]  # seconds a trial, so that it can be caught in the middle


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("space") / "small.yaml"
    file.write_text(SPACE)
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, space: Path) -> Path:
    """The folder of a search of 6 trials in 2 slots on phantoms of its own, when the command has ended."""
    storage = tmp_path_factory.mktemp("storage")
    arguments = ["--space", str(space), "--storage", str(storage), "--name", "one"]
    assert (
        main(
            [
                *arguments,
                *SMALL,
                "--trials",
                "6",
                "--epochs",
                "4",
                "--slots",
                "2",
                "--final-workers",
                "2",
                "--compare-baseline",
            ]
        )
        == 0
    )
    assert nothing_held()
    return storage / "one"


@pytest.fixture(scope="module")
def images(finished: Path) -> Any:
    """What `finished` was searched on."""
    from lungct_tune.data import make_phantoms, read_images
    from lungct_tune.data.cache import default_cache

    return read_images(make_phantoms(default_cache(), seed=0), 32, progress=False)


def study_of(experiment: Path) -> optuna.Study:
    return optuna.load_study(study_name=experiment.name, storage=f"sqlite:///{experiment}/study.db")


def nothing_held(within_s: float = 90) -> bool:
    """No actor, no placement group, all CPUs free; what is going away gets a little time to be gone."""
    import ray
    from ray.util.state import list_actors, list_placement_groups

    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [a for a in list_actors(limit=10_000) if a.state in ("ALIVE", "PENDING_CREATION", "RESTARTING")]
        # Ray Train's own, without resources: one for the whole cluster, and one that stays when Ray's state API is slow
        own = ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner")
        actors = [a for a in alive if a.class_name not in own]
        groups = [g for g in list_placement_groups(limit=10_000) if g.state != "REMOVED"]
        if not actors and not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.5)
    print([(a.class_name, a.state) for a in actors], groups, ray.available_resources())
    return False


def test_the_study_knows_every_epoch_and_what_was_stopped_early(finished: Path) -> None:
    trials = study_of(finished).trials
    ended = [trial for trial in trials if trial.state.is_finished()]
    assert len(ended) == 6
    for trial in ended:
        history = trial.user_attrs["history"]
        assert trial.intermediate_values == {int(f["epoch"]): f[OBJECTIVE] for f in history}
        assert sorted(trial.intermediate_values) == list(range(1, len(history) + 1))
        if trial.state == TrialState.PRUNED:
            assert len(history) < 4 and trial.user_attrs["ended"].startswith("stopped early")
        else:
            assert trial.state == TrialState.COMPLETE and len(history) == 4
            assert trial.value == max(trial.intermediate_values.values())


def test_the_published_configuration_is_first_and_never_stopped(finished: Path) -> None:
    first, second = study_of(finished).trials[:2]
    assert first.user_attrs["configuration"]["truncation_depth"] == 20
    assert first.user_attrs["configuration"]["dropout"] == 0.5
    assert first.state == TrialState.COMPLETE
    assert second.params["truncation_depth"] == 4


def test_the_kept_weights_give_the_figures_that_are_reported_of_the_best_epoch(finished: Path, images: Any) -> None:
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    from lungct_tune.experiment.study import finished_trials
    from lungct_tune.models.preprocessing import as_grey, forward
    from lungct_tune.models.truncated_resnet import TruncatedResNet50
    from lungct_tune.training.objective import validation_figures

    split = pd.read_csv(finished / "split.csv").set_index("path").loc[images.table["path"], "split"].to_numpy()
    valid = np.flatnonzero(split == "valid")
    grey_N1HW = as_grey(torch.from_numpy(images.images_NHW[valid]))
    for trial in finished_trials(study_of(finished)):
        model = TruncatedResNet50(trial.hyperparameters.truncation_depth, classes=4)
        model.load_state_dict(load_file(finished / "trials" / f"{trial.number:04d}" / "best.safetensors"))
        with torch.no_grad():
            probabilities_NC = forward(model.eval(), grey_N1HW, "imagenet").softmax(dim=1).numpy()
        figures = validation_figures(images.table["label"].to_numpy()[valid], probabilities_NC)
        kept_NC = np.load(finished / "trials" / f"{trial.number:04d}" / "valid.npy")
        np.testing.assert_allclose(kept_NC, probabilities_NC, atol=2e-3)
        assert trial.best is not None
        assert figures["log_loss"] == pytest.approx(trial.best.log_loss, rel=1e-3)
        assert figures[OBJECTIVE] == pytest.approx(trial.best.balanced_accuracy, abs=1e-6)
    assert not list(finished.glob("trials/*/last.pt"))


def test_the_bundle_says_what_is_asked_of_it(finished: Path) -> None:
    bundle = finished / "best"
    for line in (bundle / "checksums.txt").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    assert (bundle / "audit.json").read_bytes() == (finished / "audit.json").read_bytes()
    assert json.loads((bundle / "audit.json").read_text())["groups"]["cut_by_the_split"] == 0
    metrics = json.loads((bundle / "metrics.json").read_text())
    test, effort = metrics["test"], metrics["search"]
    assert "not patients" in metrics["data"]
    assert test["n"] == np.sum(test["confusion_matrix"])
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert test[name]["ci95"][0] <= test[name]["value"] <= test[name]["ci95"][1]
    assert test["references"]["majority class"]["balanced_accuracy"]["value"] == 0.25
    assert test["calibration"]["fitted_on"]["images"] == 24
    assert test["leak_free"] is None
    published = test["references"].get("published")
    assert (published is None) == (metrics["best_trial"]["trial"] == 0)  # nothing is compared with itself
    assert len(list((finished / "final").iterdir())) == (1 if published is None else 2)
    if published is not None:
        assert published["name"].startswith("depth 20, 0 frozen, dropout 0.50")
        gain = test["accuracy"]["value"] - published["accuracy"]["value"]
        assert published["difference"]["value"] == pytest.approx(gain) and 0 <= published["mcnemar_p"] <= 1
    assert (bundle / "learned_from.csv").read_text().count("\n") <= 1 + 192
    assert metrics["baseline_trial"]["trial"] == 0
    assert metrics["best_trial"][f"best_{OBJECTIVE}"] >= metrics["baseline_trial"][f"best_{OBJECTIVE}"]
    assert effort["trials"] == 6 and effort["slots"] == 2
    assert 1 < effort["overhead_ratio"] <= 2 * effort["wall_s"] / effort["training_s"]
    with (bundle / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(6))
    assert all(row["ended"] for row in rows)
    assert sum(int(row["epochs"]) for row in rows) == effort["epochs"]


def test_the_bundles_model_gives_the_predictions_that_were_judged(finished: Path, images: Any) -> None:
    import pandas as pd
    import torch

    from lungct_tune.evaluation.calibration import calibrated
    from lungct_tune.evaluation.inference import load_model, predict

    model, config = load_model(finished / "best")
    assert config["preprocessing"]["image_size"] == images.images_NHW.shape[1]
    predictions = pd.read_csv(finished / "best" / "predictions.csv")
    rows = images.table.set_index("path").index.get_indexer(predictions["path"])
    grey_NHW = torch.from_numpy(images.images_NHW[rows]).float() / 255
    mean, deviation = (torch.tensor(config["preprocessing"][key]) for key in ("mean", "deviation"))
    images_NCHW = (grey_NHW[:, None] - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        probabilities_NC = model(images_NCHW).softmax(dim=1).numpy()
    columns = [f"p_{name.replace(' ', '_')}" for name in config["classes"]]
    probabilities_NC = calibrated(probabilities_NC, config["calibration"]["temperature"])
    np.testing.assert_allclose(predictions[columns], probabilities_NC, atol=5e-3)
    np.testing.assert_allclose(predict(finished / "best", images.images_NHW[rows]), probabilities_NC, atol=5e-3)
    assert list(predictions["class"]) == [config["classes"][label] for label in images.table["label"].iloc[rows]]


def test_the_report_in_the_bundle_and_one_made_again_say_the_same(finished: Path, tmp_path: Path) -> None:
    from lungct_tune.report import main as report

    def said(page: Path) -> list[str]:
        without_pictures = re.sub(r"data:image/[^\"]+", "", page.read_text())
        return [line for line in without_pictures.splitlines() if '<p class="soft small">lungct_tune' not in line]

    assert report([str(finished), "--out", str(tmp_path / "again.html")]) == 0
    assert said(finished / "best" / "report.html") == said(tmp_path / "again.html")
    page = (finished / "best" / "report.html").read_text()
    assert page.count("PHANTOMS") >= 2 and "Time line of the slots" in page and "data:image/webp" in page
    assert "Not a medical device" in (finished / "best" / "MODEL_CARD.md").read_text()


def test_no_test_image_was_in_the_search(finished: Path) -> None:
    import pandas as pd

    split = pd.read_csv(finished / "split.csv")
    predictions = pd.read_csv(finished / "best" / "predictions.csv")
    assert set(predictions["path"]) == set(split[split["split"] == "test"]["path"])
    assert set(split.groupby("group")["split"].nunique()) == {1}


def test_a_finished_search_is_neither_begun_again_nor_extended(
    finished: Path, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["--storage", str(finished.parent), "--data", str(phantoms), *SMALL]
    assert main([*again, "--name", "one"]) == 2
    assert "--resume one" in capsys.readouterr().err
    assert main(["--storage", str(finished.parent), "--resume", "one", "--trials", "9"]) == 2
    assert "Its test split has been judged" in capsys.readouterr().err


def test_a_resumed_search_cannot_become_another(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--storage", str(finished.parent), "--resume", "one", "--seed", "5"]) == 2
    assert "cannot change seed; it began with seed = 0" in capsys.readouterr().err
    assert main(["--storage", str(finished.parent), "--resume", "two"]) == 2
    assert "no search 'two'" in capsys.readouterr().err


def test_the_plan_is_printed_and_nothing_is_left(
    tmp_path: Path, phantoms: Path, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--plan", "--data", str(phantoms), "--space", str(space), "--storage", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "2 slots of 1 worker with 1 CPU" in printed
    assert "truncation_depth: 1 to 8" in printed and "backbone_lr: 0.0001 to 0.01, logarithmic" in printed
    assert not list(tmp_path.iterdir())


def test_the_published_folders_are_taken_as_they_are(
    tmp_path: Path, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = ["--split", "official", "--data", str(phantoms), "--storage", str(tmp_path), *SMALL]
    assert main(["--plan", *official]) == 0
    rows = [line.split("│")[2:5] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    in_folders = [len(list((phantoms / part).glob("*/*.png"))) for part in ("train", "valid", "test")]
    assert [sum(int(row[i]) for row in rows) for i in range(3)] == in_folders


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "3", "--batch-size", "9"], "1 slot of 3 workers do not fit: a worker needs 1 CPU"),
        (["--slots", "3"], "the cluster holds 2 workers, and 3 are needed"),
        (["--gpus-per-worker", "1"], "a worker needs 1 CPU and 1 GPU on one node"),
        (["--cpus-per-worker", "64"], "64 CPU"),
        (["--final-workers", "3"], "--final-workers 3"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--split", "official", "--data", "TRAIN_ONLY"], "--split grouped"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    phantoms: Path,
    space: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "TRAIN_ONLY" in arguments:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train").symlink_to(phantoms / "train")
        arguments = [*arguments[:-1], str(tmp_path / "data")]
    begun = ["--data", str(phantoms), "--space", str(space), "--storage", str(tmp_path / "s"), *SMALL]
    assert main([*begun, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_crash_between_judging_and_the_bundle_is_mended_by_resuming(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.parent, tmp_path / "storage")
    experiment = tmp_path / "storage" / "one"
    judged = (experiment / "best" / "metrics.json").read_bytes()
    shutil.rmtree(experiment / "best")
    assert main(["--storage", str(experiment.parent), "--resume", "one", "--slots", "1"]) == 0
    assert json.loads((experiment / "best" / "metrics.json").read_bytes())["test"] == json.loads(judged)["test"]


def test_a_search_is_run_by_one_process_at_a_time(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl
    import shutil

    shutil.copytree(finished.parent, tmp_path / "storage")
    shutil.rmtree(tmp_path / "storage" / "one" / "best")
    with (tmp_path / "storage" / "one" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--storage", str(tmp_path / "storage"), "--resume", "one"]) == 2
    assert "another process is running one" in capsys.readouterr().err


def test_a_study_that_is_not_there_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(finished.parent, tmp_path / "storage")
    shutil.rmtree(tmp_path / "storage" / "one" / "best")
    resume = ["--storage", str(tmp_path / "storage"), "--resume", "one"]
    assert main([*resume, "--study", f"sqlite:///{tmp_path}/other.db"]) == 2
    assert "there is no study 'one'" in capsys.readouterr().err


@pytest.mark.skipif(
    not CT_IMAGES.is_dir() or not CT_WEIGHTS.is_file(), reason="no ../shared with CT images and weights"
)
def test_real_images_and_real_weights(tmp_path: Path) -> None:
    space = "search_spaces/shallow.yaml"
    arguments = ["--data", str(CT_IMAGES), "--weights", str(CT_WEIGHTS), "--normalisation", "unit", "--space", space]
    tiny = ["--image-size", "32", "--trials", "2", "--epochs", "2", "--name", "ct", "--storage", str(tmp_path)]
    assert main([*arguments, *tiny]) == 0
    metrics = json.loads((tmp_path / "ct" / "best" / "metrics.json").read_text())
    assert 130 <= metrics["test"]["n"] <= 145
    assert metrics["test"]["references"]["majority class"]["difference"]["value"] > 0
    split = (tmp_path / "ct" / "split.csv").read_text()
    assert "/l4.png" not in split and "/sq2.png" not in split


def test_two_workers_of_a_slot_and_one_of_them_killed(tmp_path: Path, phantoms: Path, space: Path) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    with command(tmp_path, phantoms, space, "--workers", "2", "--trials", "2", *SLOW, "--study", url) as run:
        experiment = tmp_path / "killed"
        wait_for(lambda: list(experiment.glob("trials/*/last.pt")), run)
        victim = train_workers()[-1]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: train_workers() and victim not in train_workers(), run)
        assert list(experiment.glob("trials/*/last.pt")), "a state was there for the slot that took over"
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    study = optuna.load_study(study_name="killed", storage=url)
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 0
    for trial in trials:
        epochs = [figures["epoch"] for figures in trial.user_attrs["history"]]
        assert epochs == list(range(1, len(epochs) + 1))  # every epoch once
        assert (trial.user_attrs["ended"] == "completed") == (len(epochs) == 8) == (trial.state == TrialState.COMPLETE)
    assert len(trials) == 2 and nothing_held()


def test_stopped_and_killed_searches_go_on(tmp_path: Path, phantoms: Path, space: Path) -> None:
    """Ctrl-C in the search, SIGKILL in the retraining, then left alone: as many trials as asked.

    What SIGKILL in the search leaves is seen in test_storage and test_watching.
    """
    experiment = tmp_path / "killed"
    with command(tmp_path, phantoms, space, "--slots", "2", "--trials", "4", *SLOW) as run:
        wait_for(lambda: ended_trials(experiment) >= 1 and epochs_of_running_trials(experiment), run)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 130
    assert f"--resume killed --storage {tmp_path}" in output
    assert nothing_held()
    after_stop = {trial.number: trial for trial in study_of(experiment).trials}
    assert 1 <= ended_trials(experiment) < 4
    running = [n for n, t in after_stop.items() if t.state == TrialState.RUNNING and t.user_attrs.get("history")]
    assert running

    with command(tmp_path, None, None) as run:
        wait_for(lambda: list(experiment.glob("final/*/checkpoint*")), run)
        run.kill()
    assert nothing_held() and not (experiment / "best").exists()

    with command(tmp_path, None, None) as run:
        output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    at_end = {trial.number: trial for trial in study_of(experiment).trials}
    assert len(finished_numbers(at_end)) == 4
    for number in finished_numbers(after_stop):
        assert at_end[number].datetime_complete == after_stop[number].datetime_complete
    for number in running:  # they went on: what they had stands at the beginning of what they have
        had, has = after_stop[number].user_attrs["history"], at_end[number].user_attrs["history"]
        assert has[: len(had)] == had
    for number in finished_numbers(at_end):
        epochs = [figures["epoch"] for figures in at_end[number].user_attrs["history"]]
        assert epochs == list(range(1, len(epochs) + 1))
    assert (experiment / "best" / "checksums.txt").exists() and nothing_held()
    metrics = json.loads((experiment / "best" / "metrics.json").read_text())
    assert metrics["search"]["trials"] == 4


# ---- a search in a process of its own -----------------------------------------------------------------


def command(
    storage: Path, data: Path | None, space: Path | None, *arguments: str
) -> AbstractContextManager[subprocess.Popen[str]]:
    """The search's command line in a process of its own; without data it resumes."""
    which = ["--resume", "killed"]
    if data is not None:
        which = ["--name", "killed", "--data", str(data), "--space", str(space), *SMALL, *arguments]
    return searching("--storage", str(storage), *which)


def train_workers() -> list[int]:
    from ray.util.state import list_actors

    alive = [
        a for a in list_actors(detail=True, limit=10_000) if a.class_name == "RayTrainWorker" and a.state == "ALIVE"
    ]
    return [worker.pid for worker in alive]


def finished_numbers(trials: dict[int, optuna.trial.FrozenTrial]) -> list[int]:
    return [number for number, trial in trials.items() if trial.state.is_finished()]


def ended_trials(experiment: Path) -> int:
    return count(experiment, "SELECT COUNT(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED', 'FAIL')")


def epochs_of_running_trials(experiment: Path) -> int:
    values = "SELECT COUNT(*) FROM trial_intermediate_values JOIN trials USING (trial_id)"
    return count(experiment, f"{values} WHERE state = 'RUNNING'")


def count(experiment: Path, query: str) -> int:
    """Read without Optuna, which would create the tables that the search is about to create."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{experiment}/study.db?mode=ro", uri=True)) as study:
            return int(study.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # not there yet, or being written
        return 0
