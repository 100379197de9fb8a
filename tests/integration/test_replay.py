"""A search in folds and over seeds, from the command to the bundle; its trials trained again."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL, SPACE
from processes import running, wait_for
from ray_state import nothing_held

from lungct_tune import replay, search
from lungct_tune.config.settings import Settings
from lungct_tune.experiment.plan import plan_search
from lungct_tune.training.objective import OBJECTIVE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """The folder of a finished search of the official split, judged by two folds; a copy from train is in test."""
    storage = tmp_path_factory.mktemp("storage")
    leaking = shutil.copytree(phantoms, storage / "leaking")
    for part in ("valid", "test"):
        shutil.copy(min((leaking / "train" / "normal").iterdir()), leaking / part / "normal" / "copy.png")
    (storage / "space.yaml").write_text(SPACE)
    of_what = ["--data", str(leaking), "--split", "official", "--space", str(storage / "space.yaml"), *SMALL]
    how = ["--trials", "3", "--epochs", "3", "--slots", "1", "--final-workers", "1", "--folds", "2", "--seeds", "2"]
    assert search.main([*of_what, *how, "--storage", str(storage), "--name", "folded"]) == 0
    return storage / "folded"


def test_the_split_keeps_its_folds_and_trials_their_spread(searched: Path) -> None:
    table = pd.read_csv(searched / "split.csv")
    assert table["fold"].isna().eq(table["split"] == "test").all()
    assert set(table["fold"].dropna()) == {0, 1}
    assert table.groupby("group")["fold"].nunique().max() == 1
    trials = pd.read_csv(searched / "best" / "trials.csv")
    assert trials[f"{OBJECTIVE}_sd"].between(0, 0.71).all()
    valid_NC = np.load(searched / "trials" / "0000" / "valid.npy")
    assert len(valid_NC) == (table["split"] != "test").sum()
    assert not list(searched.glob("trials/*/*.pt"))
    config = json.loads((searched / "best" / "config.json").read_text())
    assert config["calibration"]["temperature"] > 0


def test_the_winners_seeds_are_in_the_bundle(searched: Path) -> None:
    metrics = json.loads((searched / "best" / "metrics.json").read_text())
    scores = metrics["seeds"][OBJECTIVE]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    assert metrics["seeds"]["mean"] == pytest.approx(np.mean(scores))
    assert metrics["test"]["calibration"]["fitted_on"]["what"] == "the winner's out-of-fold predictions"
    assert metrics["test"]["references"]["shortcut: histogram"]["balanced_difference"]
    if metrics["best_trial"]["trial"] != 0:
        published = metrics["seeds"]["published"][OBJECTIVE]
        assert len(published) == 2
        assert metrics["seeds"]["difference"]["value"] == pytest.approx(np.mean(scores) - np.mean(published))
    else:
        assert metrics["seeds"]["published"] is None and metrics["seeds"]["difference"] is None
    assert "with 2 other seeds" in (searched / "best" / "report.html").read_text()
    assert not (searched / "folded-seeds").exists()


def test_what_leaks_into_test_is_judged_apart_and_said_wherever_the_figures_are(searched: Path) -> None:
    best = searched / "best"
    metrics, audit = (json.loads((best / name).read_text()) for name in ("metrics.json", "audit.json"))
    test, table = metrics["test"], pd.read_csv(searched / "split.csv")
    seen = int(table["group"][table["split"] == "test"].isin(table["group"][table["split"] != "test"]).sum())
    assert seen >= 1 and test["leak_free"]["n"] == test["n"] - seen
    assert test["leak_free"]["references"].keys() == test["references"].keys()
    assert audit["split"]["parts"] == ["train+valid", "test"]  # within which folds cut no group
    assert f"{seen} of {test['n']} test images are copies of images in train+valid" in audit["verdict"]["reasons"][0]
    said = f"For {seen} of the {test['n']} test images an image of the same group"
    page, card = ((best / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert said in page or "PHANTOMS" in page
    for text in (page, card):
        assert f"No trial was shown a test image, but of {seen} test images an image of the same group" in text
        assert "in 2-fold cross-validation" in text and "on validation" not in text
    assert f"For {seen} of them an image of the same group" in page
    assert "None of these groups is in train" not in page and "The test figures are too high as well" in card
    assert "Of 1 test images" not in card and "images only are known" in card


def replayed(searched: Path, trial: int, *more: str) -> int:
    return replay.main([searched.name, str(trial), "--storage", str(searched.parent), *more])


def test_a_trial_trained_again_gives_the_same_figures_to_the_last_digit(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(searched.rglob("*"))
    assert replayed(searched, 1) == 0, capsys.readouterr()
    assert "to the last digit" in capsys.readouterr().out
    assert set(searched.rglob("*")) == before


def test_figures_that_are_not_those_recorded_are_said(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = searched / "study.journal"
    changes = [json.loads(line) for line in journal.read_text().splitlines()]
    for change in changes:
        if change.get("trial_id") == 1 and "history" in change.get("user_attr", {}):
            change["user_attr"]["history"][0]["log_loss"] += 0.25
        if change.get("trial_id") == 1 and "made_with" in change.get("user_attr", {}):
            change["user_attr"]["made_with"]["torch"] = "1.0"
    journal.write_text("".join(json.dumps(change) + "\n" for change in changes))
    assert replayed(searched, 1) == 1
    said = capsys.readouterr().out
    assert "is 0.25, in log loss of epoch 1" in said and "torch 1.0, now" in said


def test_ctrl_c_ends_a_replay_that_waits_for_room(searched: Path) -> None:
    import ray

    bundle = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(bundle.ready())
    try:
        with running("replay", searched.name, "1", "--storage", str(searched.parent)) as run:
            assert run.stdout and any("epochs again" in line for line in run.stdout)
            wait_for(lambda: "PENDING" in [each["state"] for each in ray.util.placement_group_table().values()], run)
            run.send_signal(signal.SIGINT)
            run.communicate(timeout=300)
    finally:
        ray.util.remove_placement_group(bundle)
    assert run.returncode != 0  # 130, or what Ray ends a process with that leaves while a thread waits for workers
    assert nothing_held()  # found: a placement group that the workers' controller made after the end stayed for good
    assert not list(searched.rglob("images.npy")) and not list(searched.glob("*-again*"))


def test_before_a_trial_has_begun_there_is_none_to_train_again(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Settings(
        data=phantoms, image_size=32, trials=1, epochs=1, weights="none", storage=str(tmp_path), name="new"
    )
    plan = plan_search(begun, set())
    plan.save(plan.load_and_split())
    with plan.opened_study():
        pass
    assert replay.main(["new", "0", "--storage", str(tmp_path)]) == 2
    assert "new has no trial 0; none has begun" in capsys.readouterr().err


def test_what_cannot_be_trained_again_is_refused(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lungct_tune.data import make_phantoms

    assert replayed(searched, 7) == 2
    assert "has no trial 7; it has 0 to 2" in capsys.readouterr().err
    assert replayed(searched, 1, "--data", str(make_phantoms(tmp_path, seed=5, patients=12, size=32))) == 2
    assert "are not those that folded started with" in capsys.readouterr().err
    assert replay.main(["nothing", "1", "--storage", str(tmp_path)]) == 2
    assert "there is no search" in capsys.readouterr().err
