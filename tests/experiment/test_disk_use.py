"""What a search leaves on its storage, and the command that removes what is not needed any more."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from lungct_tune.clean import main as clean
from lungct_tune.config.search_space import parse_space
from lungct_tune.config.settings import validate
from lungct_tune.experiment.disk_use import (
    STATE_SIZE,
    as_size,
    expected_bytes,
    free_there,
    not_needed,
    sizes_by_kind,
    weight_bytes,
)
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.lock import exclusive_lock

if TYPE_CHECKING:
    from pathlib import Path

NEEDED = [
    *("settings.yaml", "space.yaml", "split.csv", "audit.json", "study.journal", ".lock", "best/model.safetensors"),
    *("best/checksums.txt", "tune/trial_0001/events.out.tfevents.1.host"),
]
OF_A_USER = ["notes.txt", "trials/notes.txt", "trials/0007/my.pt", "final/plot.png", "so_far/README", "images.npy"]
OF_SEEDS = ["one-seeds/trials/0002/state-0030.pt", "one-seeds/trials/0001/report.json"]
REMOVABLE = {
    "weights and predictions of the best trials": ["trials/0007/model.safetensors", "trials/0012/valid.npy"],
    "states of trials that had not ended": ["trials/0007/state-0012.pt", "trials/0009/state-0012-1.pt"],
    "files of the retraining": [
        "final/trial_0007_012_epochs/last.pt",
        "final/trial_0007_012_epochs_without_fold_1/features.npz",
    ],
    "bundles that were made while it ran": ["so_far/000012/model.safetensors"],
    "images for the workers": ["search-images.npy", "test-images.npy"],
    "folders of Ray Train, trainings with other seeds": [
        "slots/one-slot-1-6066baac/.validate_storage_marker",
        *OF_SEEDS,
    ],
    "files of a replay that was killed": [
        *("one-again/trials/0003/state-0002.pt", "one-again-0123abcd/trials/0003/state-0002.pt"),
        "tmpa1b2_3d4/images.npy",
    ],
    "temporary files": [".probe", "trials/0007/state-0013.pt.0123abcd.part"],
}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for path in [*NEEDED, *OF_A_USER, *chain.from_iterable(REMOVABLE.values())]:
        file = tmp_path / "one" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(1000))
    return Experiment(str(tmp_path / "one"))


def test_what_is_not_needed_is_said_and_removed_and_nothing_else(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sizes_by_kind(not_needed(experiment, ended=True)) == {
        what: 1000 * len(files) for what, files in REMOVABLE.items()
    }
    assert clean([experiment.uri]) == 0
    said = capsys.readouterr().out
    assert all(what in said for what in REMOVABLE) and "17 files, 17 kB; 14 kB are left" in " ".join(said.split())
    assert set(experiment.files()) == {*NEEDED, *OF_A_USER}
    assert not experiment.exists("slots/one-slot-1-6066baac") and not experiment.exists("trials/0009")
    assert clean([experiment.uri]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_a_search_that_has_not_ended_keeps_all_without_a_word_of_the_user(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment.delete_folder("best")
    before = experiment.files()
    assert clean([experiment.uri]) == 2
    assert "has not ended, so nothing was removed" in capsys.readouterr().err
    with exclusive_lock(experiment):  # it runs
        assert clean([experiment.uri, "--unfinished"]) == 2
    assert "another process is running one" in capsys.readouterr().err
    assert experiment.files().keys() == before.keys()
    assert clean([experiment.uri, "--unfinished"]) == 0
    # what calibrates the bundle, and the figures of a seed
    assert set(not_needed(experiment, ended=True)) == {"trials/0012/valid.npy", *OF_SEEDS[1:]}


def test_a_retraining_that_has_ended_is_kept_for_the_bundle(experiment: Experiment) -> None:
    experiment.delete_folder("best")
    folder = "final/trial_0007_012_epochs"
    for name in ("model.safetensors", "features.npz", "test_probabilities.npy"):
        experiment.write(f"{folder}/{name}", b"done")
    assert clean([experiment.uri, "--unfinished"]) == 0
    kept = {path for path in experiment.files("final") if path not in OF_A_USER}
    assert {f"{folder}/{name}" for name in ("model.safetensors", "features.npz", "test_probabilities.npy")} <= kept
    assert not any("without_fold_1" in path for path in kept)


def test_a_folder_that_is_no_experiment_is_refused(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ones" / "slots").mkdir(parents=True)
    (tmp_path / "ones" / "slots" / "mine").write_text("mine")
    assert clean(["ones", "--storage", str(tmp_path)]) == 2
    assert "no search 'ones'" in (said := capsys.readouterr().err) and "did you mean one?" in said
    assert (tmp_path / "ones" / "slots" / "mine").exists()


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 11, 20, 22, 41, 49])
def test_the_size_of_weights_is_known_without_a_network(depth: int) -> None:
    from lungct_tune.models.truncated_resnet import TruncatedResNet50

    state = TruncatedResNet50(depth).state_dict().values()
    assert weight_bytes(depth) == pytest.approx(sum(tensor.nbytes for tensor in state), rel=0.02)


def test_the_space_of_a_running_search_counts_the_models_of_all_folds(tmp_path: Path) -> None:
    space = parse_space("truncation_depth: {low: 4, high: 22}", "space")
    (one, one_left), (five, five_left) = (
        expected_bytes(validate({"trials": 40, "folds": folds, "data": str(tmp_path)}), space, slots=3)
        for folds in (1, 5)
    )
    assert one_left == five_left, "only the first fold's weights are kept"
    assert five - one == 4 * 3 * 2 * STATE_SIZE * weight_bytes(22)


def test_a_plan_says_where_the_disk_has_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: a search began on a full disk without a word, and waited at the end of its first trial."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=90_000_000))
    new = Experiment.at(str(tmp_path / "results"), "one")
    assert free_there(new, 90_000_000) == ""
    assert free_there(new, 90_000_001) == "; only 90 MB are free there"
    assert free_there(Experiment.at("s3://bucket", "one"), 10**12) == ""


def test_sizes_are_rounded_for_reading() -> None:
    assert [as_size(size) for size in (12, 12_345, 447_000_000, 1_250_000_000)] == ["0 kB", "12 kB", "447 MB", "1.2 GB"]
