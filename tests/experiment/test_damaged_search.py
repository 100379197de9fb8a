"""A file of a search that is missing or damaged is named, with what to do, and is not taken for one that never was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundles import finished
from rich.console import Console

from lungct_tune import clean, pull
from lungct_tune.config.settings import Settings
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import CHECKSUMS, FOLDER, BundleError
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.plan import plan_search, read_plan
from lungct_tune.experiment.results import read_results
from lungct_tune.experiment.transfer import fetch


@pytest.fixture(scope="module")
def begun(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that has begun."""
    storage = str(tmp_path_factory.mktemp("storage"))
    settings = Settings(data=phantoms, image_size=32, trials=1, epochs=1, weights="none", storage=storage)
    plan = plan_search(settings.model_copy(update={"name": "begun"}), set())
    plan.save(plan.load_and_split())
    with plan.opened_study():
        return Path(plan.experiment.uri)


def damage(file: Path, how: str) -> None:
    file.unlink(missing_ok=True)
    if how == "empty":
        file.touch()
    if how == "a folder":
        file.mkdir()


@pytest.mark.parametrize("how", ["missing", "empty", "a folder"])
@pytest.mark.parametrize("name", ["space.yaml", "split.csv", "study.journal", "audit.json"])
def test_whoever_reads_a_search_says_which_file_is_damaged(begun: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = shutil.copytree(begun, tmp_path / "begun")
    damage(folder / name, how)
    if (name, how) == ("audit.json", "missing"):  # as where a search was stopped at its start
        assert read_results(Experiment(str(folder))).audit is None
        return
    with pytest.raises(UserError) as refused:
        read_results(Experiment(str(folder)))
    said = str(refused.value)
    assert str(folder) in said and name in said and ("restore" in said or "has no study.journal" in said)
    assert "Error:" not in said.replace("EmptyDataError:", "") and "bucket" not in said


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("space.yaml", "missing", "space.yaml is missing; restore it"),
        ("space.yaml", "empty", "space.yaml is not the file that the search wrote: .*; restore it"),
        ("study.journal", "empty", "study.journal; restore that file"),
    ],
)
def test_resume_says_which_file_is_damaged(begun: Path, tmp_path: Path, name: str, how: str, says: str) -> None:
    folder = shutil.copytree(begun, tmp_path / "begun")
    damage(folder / name, how)
    with (
        pytest.raises(UserError, match=says),
        read_plan(Experiment(str(folder)), set()).opened_study(),
    ):
        pass


@pytest.mark.parametrize("name", ["space.yaml", "split.csv", "settings.yaml"])
def test_a_file_without_its_last_line_is_not_taken_for_a_shorter_one(begun: Path, tmp_path: Path, name: str) -> None:
    """Found: a space had a parameter less, a report images less, without a word."""
    folder = shutil.copytree(begun, tmp_path / "begun")
    *lines, _ = (folder / name).read_bytes().splitlines(keepends=True)
    (folder / name).write_bytes(b"".join(lines))
    for read in (read_results, lambda experiment: read_plan(experiment, set())):
        with pytest.raises(UserError, match=rf"{folder}/{name} is not .* restore it"):
            read(Experiment(str(folder)))


def test_a_bundle_without_checksums_is_not_taken_for_a_search_without_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = finished(tmp_path)
    experiment.delete(f"{FOLDER}/{CHECKSUMS}")
    with pytest.raises(BundleError, match=r"one/best has no checksums.txt, .* --resume one then writes it again"):
        fetch(experiment, tmp_path / "pulled", Console(), everything=False)
    assert pull.main([experiment.uri, str(tmp_path / "pulled"), "--all"]) == 2
    assert clean.main([experiment.uri, "--unfinished"]) == 2
    assert capsys.readouterr().err.count("has no checksums.txt") == 2
