"""Searches compared on the same validation images: the best so far by trials and by time, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from processes import run_here
from recorded_search import EPOCHS, Search, finished_search

from lungct_tune.compare import main
from lungct_tune.errors import UserError
from lungct_tune.evaluation.search_curves import SearchCurve, search_curve, time_steps, trial_steps
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.results import read_results

run = partial(run_here, main)


def curve_of(folder: Path) -> SearchCurve:
    return search_curve(str(folder), read_results(Experiment(str(folder))))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """5 trials, of which the fourth failed; its bundle is there."""
    return finished_search(tmp_path_factory.mktemp("ended"), phantoms).folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """2 trials that ended, the first without a model, and one that runs."""
    search = Search(tmp_path_factory.mktemp("running"), phantoms, trials=9)
    search.run(epochs=2, failure="a slot died")
    search.run()
    search.run(epochs=1)
    return search.folder


@pytest.fixture
def copy(ended: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ended, tmp_path / "copy")


def test_a_curve_is_the_best_completed_trial_so_far(ended: Path, running: Path) -> None:
    last = 0.3 + 0.1 * EPOCHS
    assert curve_of(ended).best == pytest.approx((last, last + 0.01, last + 0.02, last + 0.02, last + 0.04))
    curve = curve_of(running)
    assert curve.best == (None, pytest.approx(last + 0.01)), "a trial that failed counts, and has no model"
    assert curve.after_trials(2) == curve.best[1] and curve.after_trials(3) is None
    assert trial_steps([curve_of(ended), curve]) == [1, 2, 4]


def test_time_is_counted_from_the_first_epoch_without_interruptions(ended: Path) -> None:
    results = read_results(Experiment(str(ended)))
    curve = search_curve("one", results)
    # trial n has its epochs of 2.5 s end at 10 n + 3, + 6 and + 9; the fourth failed after its first
    assert curve.seconds == pytest.approx((8.5, 18.5, 28.5, 32.5, 48.5))
    assert curve.after_seconds(8.4) is None and curve.after_seconds(30) == curve.best[2]
    assert curve.after_seconds(50) is None
    assert time_steps([curve]) == [10, 30]
    later = [
        replace(trial, history=tuple(replace(e, at=(e.at or 0) + 1000 * (trial.number > 1)) for e in trial.history))
        for trial in results.trials
    ]
    paused = search_curve("one", replace(results, trials=later)).seconds
    # the pause of 1001.5 s after trial 1 does not count
    assert paused == pytest.approx((8.5, 18.5, 27.0, 31.0, 47.0))


def test_studies_without_times_are_compared_by_trials(ended: Path) -> None:
    results = read_results(Experiment(str(ended)))
    old = [
        replace(trial, history=tuple(replace(epoch, at=None) for epoch in trial.history)) for trial in results.trials
    ]
    curve = search_curve("old", replace(results, trials=old))
    assert curve.seconds is None and curve.after_seconds(1) is None and curve.after_trials(5) is not None


def test_an_ended_and_a_running_search_are_compared(ended: Path, running: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, said, complained = run(ended, running, "--html", page)
    assert status == 0, complained
    text = page.read_text()
    for shown in ("After 2 trials, which all have", "of the smallest class changes"):
        assert shown in " ".join(said.split()) and shown in text
    assert "after 4 trials" in text and "McNemar" not in text
    assert text.count('role="img"') == 2 and "trials that have ended" in text
    assert "test images" not in said, "only one of them has a final model"


def test_final_models_of_searches_are_compared_too(ended: Path, copy: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, said, complained = run(f"file://{ended}", copy, "--html", page)
    assert status == 0, complained
    assert "16 test images" in said
    assert f"{copy} is not shown to be more or less accurate than file://{ended}" in said
    assert "McNemar" in page.read_text()


def edit_settings(folder: Path, **changed: object) -> None:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"fingerprint": "0" * 64}, "the images, their classes, their groups or their window differ"),
        ({"folds": 3}, "trials were evaluated on validation and in 3-fold cross-validation"),
        ({"image_size": 64}, "the images were read at 32 and 64 pixels"),
    ],
)
def test_searches_on_other_images_are_refused(changed: dict[str, object], says: str, ended: Path, copy: Path) -> None:
    edit_settings(copy, **changed)
    status, _, complained = run(ended, copy)
    assert status == 2 and says in complained and "give the folder best of each" in complained


def test_searches_with_another_split_are_refused(ended: Path, copy: Path) -> None:
    file = copy / "split.csv"
    rows = file.read_text().splitlines()
    at = next(i for i, row in enumerate(rows) if row.endswith(",valid"))
    file.write_text("\n".join([*rows[:at], rows[at].removesuffix("valid") + "train", *rows[at + 1 :]]) + "\n")
    edit_settings(copy, sha256=None)
    status, _, complained = run(ended, copy)
    moved = rows[at].split(",")[0]
    assert status == 2 and f"1 images are in another part or fold, such as {moved}" in complained


def test_a_search_without_a_completed_trial_is_refused(ended: Path, tmp_path: Path, phantoms: Path) -> None:
    search = Search(tmp_path, phantoms, trials=3)
    search.run(epochs=1)
    status, _, complained = run(ended, search.folder)
    assert status == 2 and "none of its trials has run to its end yet" in complained


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_a_study_with_fewer_trials_than_its_bundle_is_refused(share: float, copy: Path) -> None:
    """Found: a journal that was cut at the end of a line was reported as a search of fewer trials."""
    lines = (copy / "study.journal").read_bytes().splitlines(keepends=True)
    (copy / "study.journal").write_bytes(b"".join(lines[: 1 + int(share * len(lines))]))
    with pytest.raises(UserError, match=r"copy has \d trials? .* best/ was made after 5: restore study\.journal"):
        read_results(Experiment(str(copy)))


def test_a_search_and_a_model_are_not_compared(ended: Path) -> None:
    for model in (ended / "best", f"file://{ended}/best"):
        status, _, complained = run(f"file://{ended}", model)
        assert status == 2 and f"file://{ended} is a search and {model} is not" in complained
        assert f"give file://{ended}/best" in complained
    assert run(ended / "best", f"file://{ended}/best")[0] == 0, "both are models"


def test_a_folder_with_nothing_to_compare_says_what_to_give(ended: Path, tmp_path: Path) -> None:
    status, _, complained = run(tmp_path, tmp_path)
    assert status == 2 and "or the folder of a search (results/NAME)" in complained
    (tmp_path / "study").mkdir()
    shutil.copy(ended / "settings.yaml", tmp_path / "study")
    assert run(ended, tmp_path / "study")[0] == 2
