"""Experiments that commit f89f17a made, before the modules moved: they report, are pulled, and resume.

`f89f17a.tar.xz` holds a data set of 72 phantom images and two experiments. `f89f17a` is finished. `interrupted` was
killed with SIGKILL: trial 1 of 6 was complete, trials 0 and 2 were running. The state of trial 0 was left out of the
archive for its size, so that trial begins again. The state of trial 2 holds three epochs.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from studies import epochs_of

from lungct_tune.experiment.bundle import verify
from lungct_tune.pull import main as pull
from lungct_tune.report import main as report
from lungct_tune.search import main as search

ARCHIVE = Path(__file__).parent / "f89f17a.tar.xz"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage with both experiments. Nothing writes to it; their images are where they say."""
    folder = tmp_path_factory.mktemp("f89f17a")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for file in folder.glob("results/*/settings.yaml"):
        settings = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(settings | {"data": str(folder / "data")}, sort_keys=False))
    return folder / "results"


def trials_of(experiment: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=experiment.name, storage=f"sqlite:///{experiment}/study.db").trials


def keys(value: Any, path: str = "") -> set[str]:
    """The paths of all keys of nested objects."""
    if isinstance(value, dict):
        return {path}.union(*(keys(inner, f"{path}/{name}") for name, inner in value.items()))
    return {path}


@pytest.mark.parametrize(
    ("name", "says"),
    [("f89f17a", "4 completed, 2 stopped early"), ("interrupted", "has not ended: 1 of 6 trials")],
)
def test_an_old_experiment_is_reported(results: Path, name: str, says: str, tmp_path: Path) -> None:
    assert report([str(results / name), "--out", str(tmp_path / "page.html")]) == 0
    assert says in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("name", "bundle", "says"),
    [("f89f17a", "best", "test accuracy"), ("interrupted", "so_far/000001", "best of the first 1 of 6 trials")],
)
def test_an_old_bundle_is_pulled_and_verified(
    results: Path, name: str, bundle: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull([name, str(tmp_path / "model"), "--storage", str(results)]) == 0
    verify(tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == {
        file.name: file.read_bytes() for file in (results / name / bundle).iterdir()
    }
    assert says in capsys.readouterr().out


@pytest.mark.usefixtures("cluster")
@pytest.mark.long
def test_an_old_interrupted_search_is_pulled_with_all_that_it_needs_and_goes_on(results: Path, tmp_path: Path) -> None:
    before = trials_of(results / "interrupted")
    copy = tmp_path / "interrupted"
    assert pull([str(results / "interrupted"), str(copy), "--all"]) == 0
    assert search(["--resume", "interrupted", "--storage", str(tmp_path)]) == 0

    after = [trial for trial in trials_of(copy) if trial.state.is_finished()]
    assert [trial.number for trial in after] == list(range(6))
    for trial in after:
        epochs = [figures["epoch"] for figures in epochs_of(trial)]
        assert epochs == list(range(1, len(epochs) + 1))
    assert after[1] == before[1]
    had, has = epochs_of(before[2]), epochs_of(after[2])
    assert len(had) == 3 and len(has) > 3
    assert has[:3] == had  # with the time of day at which they ended: none was trained again

    old = trials_of(results / "f89f17a")[0].user_attrs
    for trial in after:
        assert old.keys() <= trial.user_attrs.keys()
        assert all(old["history"][0].keys() <= figures.keys() for figures in epochs_of(trial))
    verify(copy / "best")
    assert not (copy / "so_far").exists()
    for file in ("config.json", "metrics.json", "audit.json"):
        then, now = (json.loads((folder / "best" / file).read_text()) for folder in (results / "f89f17a", copy))
        # a trial's figures were those of its best epoch, and are those of its last one
        renamed = {re.sub(r"_trial/best_(?!epoch)", "_trial/", key) for key in keys(then) if "best_epoch" not in key}
        # it was compared with one shortcut, and is with each
        renamed = {key.replace("references/shortcut", "references/shortcut: file") for key in renamed}
        assert renamed <= keys(now), file
