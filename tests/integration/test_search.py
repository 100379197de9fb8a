"""A finished search: what it leaves on the disk, and what is refused before or after one."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import SMALL
from optuna.trial import TrialState
from studies import epochs_of, trials_in

from lungct_tune.config.search_space import parse_space, read_space
from lungct_tune.experiment.looks import FOLDER as LOOKS
from lungct_tune.experiment.study import trial_record
from lungct_tune.search import main
from lungct_tune.training.objective import OBJECTIVE
from lungct_tune.tuning.sampler import first_trials

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def images(finished: Path) -> Any:
    """What `finished` was searched on."""
    from lungct_tune.data import make_phantoms, read_images
    from lungct_tune.data.cache import default_cache

    return read_images(make_phantoms(default_cache(), seed=0), 32, progress=False)


def test_the_study_knows_every_epoch_and_what_was_stopped_early(finished: Path) -> None:
    trials = trials_in(finished)
    ended = [trial for trial in trials if trial.state.is_finished()]
    assert len(ended) == 6
    for trial in ended:
        history = epochs_of(trial)
        assert trial.intermediate_values == {int(f["epoch"]): f[OBJECTIVE] for f in history}
        assert sorted(trial.intermediate_values) == list(range(1, len(history) + 1))
        if trial.state == TrialState.PRUNED:
            assert len(history) < 4 and trial.user_attrs["ended"].startswith("stopped early")
        else:
            assert trial.state == TrialState.COMPLETE and len(history) == 4
            assert trial.value == trial.intermediate_values[4]


def test_the_published_configuration_is_first_and_never_stopped(finished: Path) -> None:
    first, second = trials_in(finished)[:2]
    assert first.user_attrs["configuration"]["truncation_depth"] == 20
    assert first.user_attrs["configuration"]["dropout"] == 0.5
    assert first.state == TrialState.COMPLETE
    assert second.params["truncation_depth"] == 4


def test_a_plan_knows_the_trials_that_depend_on_no_result(finished: Path, space: Path) -> None:
    known = first_trials(parse_space(read_space(space), str(space)), seed=0, trials=6, slots=1)
    assert known == [trial_record(trial).hyperparameters for trial in trials_in(finished)[:3]]


def test_the_kept_weights_give_the_figures_that_are_reported(finished: Path, images: Any) -> None:
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    from lungct_tune.experiment.trial import Outcome
    from lungct_tune.models.preprocessing import as_grey, forward
    from lungct_tune.models.truncated_resnet import TruncatedResNet50
    from lungct_tune.training.objective import validation_figures

    split = pd.read_csv(finished / "split.csv").set_index("path").loc[images.table["path"], "split"].to_numpy()
    valid = np.flatnonzero(split == "valid")
    grey_N1HW = as_grey(torch.from_numpy(images.images_NHW[valid]))
    trials = [trial_record(trial) for trial in trials_in(finished)]
    completed = [trial for trial in trials if trial.outcome is Outcome.COMPLETED]
    assert {int(folder.name) for folder in finished.glob("trials/*")} == {trial.number for trial in completed}
    for trial in completed:
        of = trial.hyperparameters
        model = TruncatedResNet50(of.truncation_depth, classes=4, mirrored=of.mirrored)
        model.load_state_dict(load_file(finished / "trials" / f"{trial.number:04d}" / "model.safetensors"))
        with torch.no_grad():
            probabilities_NC = forward(model.eval(), grey_N1HW, "imagenet").softmax(dim=1).numpy()
        figures = validation_figures(images.table["label"].to_numpy()[valid], probabilities_NC)
        kept_NC = np.load(finished / "trials" / f"{trial.number:04d}" / "valid.npy")
        np.testing.assert_allclose(kept_NC, probabilities_NC, atol=2e-3)
        assert trial.last is not None
        assert figures["log_loss"] == pytest.approx(trial.last.log_loss, rel=1e-3)
        assert figures[OBJECTIVE] == pytest.approx(trial.last.balanced_accuracy, abs=1e-6)
    assert not list(finished.glob("trials/*/*.pt"))


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
    assert test["calibration"]["fitted_on"]["images"] == 48
    assert test["leak_free"] is None
    published = test["references"].get("published")
    assert (published is None) == (metrics["best_trial"]["trial"] == 0)  # nothing is compared with itself
    assert len(list((finished / "final").iterdir())) == (1 if published is None else 2)
    if published is not None:
        assert published["name"].startswith("depth 20, 0 frozen, dropout 0.50")
        gain = test["accuracy"]["value"] - published["accuracy"]["value"]
        assert published["difference"]["value"] == pytest.approx(gain) and 0 <= published["mcnemar_p"] <= 1
    assert (bundle / "learned_from.csv").read_text().count("\n") <= 1 + 384
    assert metrics["baseline_trial"]["trial"] == 0
    assert metrics["best_trial"][OBJECTIVE] >= metrics["baseline_trial"][OBJECTIVE]
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
    from lungct_tune.evaluation.classifier import Classifier
    from lungct_tune.evaluation.inference import load_model

    model, config = load_model(finished / "best")
    assert config.preprocessing.image_size == images.images_NHW.shape[1]
    predictions = pd.read_csv(finished / "best" / "predictions.csv")
    rows = images.table.set_index("path").index.get_indexer(predictions["path"])
    grey_NHW = torch.from_numpy(images.images_NHW[rows]).float() / 255
    mean, deviation = (torch.tensor(getattr(config.preprocessing, key)) for key in ("mean", "deviation"))
    images_NCHW = (grey_NHW[:, None] - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        probabilities_NC = model(images_NCHW).softmax(dim=1).numpy()
    columns = [f"p_{name.replace(' ', '_')}" for name in config.classes]
    assert config.calibration is not None
    probabilities_NC = calibrated(probabilities_NC, config.calibration.temperature)
    np.testing.assert_allclose(predictions[columns], probabilities_NC, atol=5e-3)
    classified = Classifier.load(finished / "best").classify(images.images_NHW[rows])
    np.testing.assert_allclose(classified.probabilities_NC, probabilities_NC, atol=5e-3)
    assert list(predictions["class"]) == [config.classes[label] for label in images.table["label"].iloc[rows]]


def test_the_report_in_the_bundle_and_one_made_again_say_the_same(finished: Path, tmp_path: Path) -> None:
    from lungct_tune.report import main as report

    def said(page: Path) -> list[str]:
        without_pictures = re.sub(r"data:image/[^\"]+", "", page.read_text())
        dated = ('<p class="soft small">lungct_tune', "Research software, made 20")
        return [line for line in without_pictures.splitlines() if not any(date in line for date in dated)]

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
    assert "Its test split has been used" in capsys.readouterr().err


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
    (looked,) = (experiment.parent / LOOKS).iterdir()
    (mark,) = looked.iterdir()  # a search counts once
    assert mark.name.startswith("one-")


@pytest.mark.long
def test_a_held_search_takes_more_trials_until_it_is_judged(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finished search as it was before it looked at its test split, in a copy of its storage."""
    import shutil

    shutil.copytree(finished.parent, tmp_path / "storage")
    experiment = tmp_path / "storage" / "one"
    for made_with_test in (experiment / "best", experiment / "final", experiment.parent / LOOKS):
        shutil.rmtree(made_with_test)
    where = ["--storage", str(experiment.parent)]
    assert main([*where, "--resume", "one", "--hold-test", "--trials", "7", "--slots", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the test split has not been looked at" in said and "--judge one" in said
    assert not {"best", "final"} & {path.name for path in experiment.iterdir()}
    assert not (experiment.parent / LOOKS).exists()
    assert main([*where, "--judge", "one", "--slots", "1"]) == 0
    metrics = json.loads((experiment / "best" / "metrics.json").read_text())
    assert metrics["search"]["trials"] == 7 and metrics["looks"] == 1 and metrics["test"]["n"] > 0
    assert main([*where, "--resume", "one", "--trials", "8"]) == 2
    assert "Its test split has been used" in capsys.readouterr().err


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
