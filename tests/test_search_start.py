"""How a search starts: what is refused at once starts no Ray cluster, and a cluster starts while images are read."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.config.settings import Settings
from lungct_tune.display import Display
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import CONFIG, write_bundle
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.lock import exclusive_lock
from lungct_tune.experiment.plan import PlanError, check_place, plan_search
from lungct_tune.experiment.study import StudyError
from lungct_tune.experiment.trial import EpochFigures, Outcome, TrialRecord
from lungct_tune.filesystem import StorageError
from lungct_tune.search import main, search
from lungct_tune.search_run import SearchRun, start_search

if TYPE_CHECKING:
    from pathlib import Path

    from lungct_tune.experiment.plan import Plan


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "trials = '0'"),
        (["--space", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nothing"], "there is no search 'nothing'"),
        (["--data", "."], "error: "),
    ],
)
def test_what_is_refused_at_once_starts_no_cluster(arguments: list[str], says: str, tmp_path: Path) -> None:
    sessions = tmp_path / "ray"
    sessions.mkdir()
    own = {"RAY_TMPDIR": str(sessions), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
    command = [sys.executable, "-m", "lungct_tune.search", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr
    assert list(sessions.iterdir()) == []


def refused_at_its_start(plan: Plan, error: type[UserError] = PlanError) -> UserError:
    """What a search says that has read its images, and begins."""
    nothing: Any = SimpleNamespace()
    display: Any = SimpleNamespace(step=lambda step: nullcontext(), console=None)
    with (
        pytest.raises(error) as refused,
        plan.resumable(),
        start_search(plan, nothing, {}, nothing, None, None, display),
    ):
        pass
    return refused.value


def test_what_another_process_did_while_images_were_read_is_not_done_again(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.search_run.check_storage", lambda experiment: None)
    same = {"data": phantoms, "storage": str(tmp_path), "name": "one", "image_size": 32, "weights": "none"}
    first, second = (plan_search(Settings.model_validate(same), set()) for _ in range(2))
    first.save(first.load_and_split())
    begun = refused_at_its_start(second)
    assert "already holds a search" in str(begun) and "To continue" in begun.__notes__[0]
    again = plan_search(Settings(resume="one", storage=str(tmp_path)), {"resume", "storage"})
    write_bundle(first.experiment, {CONFIG: b"{}"})
    ended = refused_at_its_start(again)
    assert "one is finished; its model is in" in str(ended) and not hasattr(ended, "__notes__")


def test_a_search_that_another_process_runs_is_refused_before_its_storage_is_touched(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: the check of the storage deletes a file that the workers of the running search look for."""
    asked = Settings.model_validate({"data": phantoms, "storage": str(tmp_path), "name": "one", "weights": "none"})
    plan, checked = plan_search(asked, set()), list[Experiment]()
    monkeypatch.setattr("lungct_tune.search_run.check_storage", checked.append)
    with exclusive_lock(plan.experiment):
        refused = refused_at_its_start(plan, StorageError)
    assert "another process is running one" in str(refused) and not checked


def test_a_search_that_another_process_runs_is_refused_before_its_images_are_read(
    phantoms: Path, tmp_path: Path
) -> None:
    """Found: it was refused after its images were read and Ray had started."""
    asked = {"data": phantoms, "storage": str(tmp_path), "name": "one", "image_size": 32, "weights": "none"}
    plan = plan_search(Settings.model_validate(asked), set())
    plan.save(plan.load_and_split())
    again, given = Settings(resume="one", storage=str(tmp_path)), {"resume", "storage"}
    plan_search(again, given)
    with exclusive_lock(plan.experiment):
        with pytest.raises(StorageError, match="another process is running one"):
            plan_search(again, given)
        plan_search(again.model_copy(update={"plan": True}), given)  # which changes nothing


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"study": "sqlite:////nowhere/study.db"}, r"nowhere/study\.db cannot be opened: (.|\n)*Check --study"),
        ({"study": "sqlite:///HERE/taken.db"}, r"there is a study 'one' in sqlite:.*taken\.db already"),
        ({"track": "mlflow:http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9 cannot be used"),
    ],
)
def test_a_database_or_a_server_that_cannot_be_used_is_refused_before_the_images_are_read(
    where: dict[str, str], says: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.search.load_and_audit", pytest.fail)
    optuna.create_study(storage=f"sqlite:///{tmp_path}/taken.db", study_name="one")
    where = {name: address.replace("HERE", str(tmp_path)) for name, address in where.items()}
    asked = {"data": phantoms, "storage": str(tmp_path / "results"), "name": "one", "weights": "none"} | where
    with pytest.raises(UserError, match=says):
        search(Settings.model_validate(asked), set(), Console())


def test_a_study_that_is_not_in_the_database_is_refused_at_once(phantoms: Path, tmp_path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{tmp_path}/other.db", study_name="other")
    asked = {"data": phantoms, "storage": str(tmp_path), "name": "one", "image_size": 32, "weights": "none"}
    plan = plan_search(Settings.model_validate(asked | {"study": f"sqlite:///{tmp_path}/own.db"}), set())
    plan.save(plan.load_and_split())
    again = Settings(resume="one", storage=str(tmp_path), study=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(StudyError, match="there is no study 'one'"):
        plan_search(again, {"resume", "storage", "study"})


def test_a_folder_where_the_bundle_cannot_be_written_is_refused_before_anything_is_trained(
    phantoms: Path, tmp_path: Path
) -> None:
    asked = Settings.model_validate({"data": phantoms, "storage": str(tmp_path), "name": "one", "weights": "none"})
    notes = tmp_path / "one" / "best" / "notes.txt"
    notes.parent.mkdir(parents=True)
    plan_search(asked, set())  # an empty folder does no harm
    notes.write_text("mine")
    with pytest.raises(PlanError, match=r"one/best is there, .* move it away"):
        plan_search(asked, set())
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_a_search_that_was_stopped_at_its_start_begins_again_with_the_same_command(
    scheme: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its study was there, and its settings.yaml was not yet. Found: with remote storage its copy was refused."""
    monkeypatch.chdir(tmp_path)
    storage = f"{scheme}{tmp_path}/there"
    asked = Settings.model_validate({"data": phantoms, "storage": storage, "name": "one", "weights": "none"})
    plan = plan_search(asked.model_copy(update={"epochs": 3}), set())
    for _ in range(2):
        with plan.locked(print), plan.opened_study() as study:
            assert study.get_trials(states=[TrialState.WAITING]) == study.get_trials() != []


def test_the_study_of_a_search_that_was_deleted_is_refused_and_not_copied_to_the_storage(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: whoever deleted that study, as the message says, got it back from the copy."""
    monkeypatch.chdir(tmp_path)
    storage = f"fsspec+file://{tmp_path}/there"
    asked = Settings.model_validate({"data": phantoms, "storage": storage, "name": "one", "weights": "none"})
    plan = plan_search(asked.model_copy(update={"epochs": 3}), set())
    with plan.locked(print), plan.opened_study() as study:
        study.ask()
    plan.experiment.delete_folder("")
    taken = pytest.raises(StudyError, match=r"is a study 'one' in .*study\.journal already")
    with taken, plan.locked(print), plan.opened_study():
        pass
    assert not plan.experiment.exists("study")
    (plan.experiment.local_folder / "study.journal").unlink()
    with plan.locked(print), plan.opened_study():
        pass


def test_what_a_search_resumes_from_is_not_written_again_where_it_is_the_same(phantoms: Path, tmp_path: Path) -> None:
    asked = {"data": phantoms, "storage": str(tmp_path), "name": "one", "image_size": 32, "weights": "none"}
    first = plan_search(Settings.model_validate(asked), set())
    first.save(first.load_and_split())
    files = sorted((tmp_path / "one").iterdir())
    written = [file.stat().st_ino for file in files]
    again = Settings(resume="one", storage=str(tmp_path), trials=7)
    for given, changed in (({"resume", "storage"}, set()), ({"resume", "storage", "trials"}, {"settings.yaml"})):
        plan = plan_search(again, given)
        plan.save(plan.load_and_split())
        now = [file.stat().st_ino for file in files]
        assert {file.name for file, a, b in zip(files, written, now, strict=True) if a != b} == changed
    assert len(files) == 3 and b"trials: 7" in (tmp_path / "one" / "settings.yaml").read_bytes()


def test_a_plan_is_of_weights_that_can_be_read(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(phantoms), "--storage", str(tmp_path), "--image-size", "32", "--weights", "nosuch.pth"]
    assert main([*words, "--plan"]) == 2
    assert "nosuch.pth" in capsys.readouterr().err


def test_a_storage_where_no_folder_can_be_made_is_refused_before_the_images_are_read(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    asked = {"data": phantoms, "image_size": 32, "weights": "none"}
    with pytest.raises(StorageError, match=r"notes\.txt is a file; choose another --storage"):
        plan_search(Settings.model_validate(asked | {"storage": f"{file}/results"}), set())
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(StorageError, match="may not be written; choose another --storage"):
        plan_search(Settings.model_validate(asked | {"storage": str(tmp_path)}), set())
    with pytest.raises(StorageError, match=f"^{tmp_path} may not be written; make it writable, or use a copy"):
        check_place(Experiment(str(tmp_path)))  # as for --resume and `replay`
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("winner", "said"),
    [(0, "training the winner again, with 2 other seeds\n"), (1, "training winner and published configuration again")],
)
def test_what_is_trained_with_other_seeds_is_said_as_it_is(
    winner: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A published configuration that has won is not trained twice."""
    last, trained = EpochFigures(1, 0.5, 0.5, 1.0, 1.0, 1.0, 0.1), list[Any]()
    trials = [TrialRecord(number, PUBLISHED, (last,), Outcome.COMPLETED) for number in (0, 1)]
    monkeypatch.setattr("lungct_tune.search_run.finished_trials", lambda study: trials)
    monkeypatch.setattr("lungct_tune.search_run.rerun_with_seeds", lambda plan, *both: trained.extend(both[:2]))
    nothing: Any = SimpleNamespace(work=SimpleNamespace(slots=1), release=lambda: None, bar=lambda: "")
    plan: Any = SimpleNamespace(settings=Settings(seeds=2))
    run = SearchRun(plan, nothing, {}, nothing, nothing, nothing, nothing, None, Display(Console()))
    run._left = nothing
    run.repeat_with_seeds(trials[winner], nothing)
    assert said in capsys.readouterr().out and trained == [trials[winner], trials[0] if winner else None]
