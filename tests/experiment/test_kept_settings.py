"""What others may have written into settings.yaml does not decide where a user's password or files go."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from optuna.trial import create_trial
from rich.console import Console

from lungct_tune import replay, report, search
from lungct_tune.config.settings import Settings, SettingsError
from lungct_tune.data import DataError, make_phantoms
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.plan import Plan, PlanError, plan_search, read_plan
from lungct_tune.experiment.results import read_results
from lungct_tune.experiment.study import StudyError, open_study
from lungct_tune.reporting.console import print_start
from lungct_tune.reporting.test_section import find_pictures

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def begun(phantoms: Path, tmp_path: Path) -> Plan:
    """A search that has begun, in a folder."""
    settings = Settings(data=phantoms, image_size=32, trials=1, epochs=1, weights="none", storage=str(tmp_path))
    plan = plan_search(settings.model_copy(update={"name": "begun"}), set())
    plan.save(plan.load_and_split())
    with plan.opened_study():
        return plan


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    """A host that a bucket's writer would like to have the database's password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def overwrite(begun: Plan, **values: object) -> None:
    """What anybody may do who can write to the storage."""
    file = Path(begun.experiment.uri, "settings.yaml")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def as_remote(plan: Plan) -> str:
    """The URI of the experiment's storage, read as remote ones are."""
    return f"fsspec+file://{Path(plan.experiment.uri).parent}"


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    name, *arguments = command
    assert {"search": search, "report": report, "replay": replay}[name].main(arguments) == 2
    return capsys.readouterr().err


COMMANDS = [["report", "begun"], ["replay", "begun", "0"], ["search", "--resume", "begun"]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_local", [True, False])
def test_no_database_is_asked_that_only_the_storage_names(
    command: list[str], is_local: bool, begun: Plan, stranger: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder too may have come from a bucket, by pull --all."""
    overwrite(begun, study=f"postgresql+psycopg://me@127.0.0.1:{stranger.getsockname()[1]}/x?connect_timeout=2")
    storage = str(Path(begun.experiment.uri).parent) if is_local else as_remote(begun)
    said = refused([*command, "--storage", storage], capsys)
    assert "give its URL again: --study URL" in said and "only if you know that host" in said
    with pytest.raises(TimeoutError):
        stranger.accept()


def test_a_database_that_the_user_names_is_used(begun: Plan) -> None:
    study_url = f"sqlite:///{begun.experiment.local_folder}/elsewhere.db"
    open_study(study_url, "begun", begun.space, 1, new=True)
    overwrite(begun, study="postgresql+psycopg://me@elsewhere/x")
    assert read_results(begun.experiment, study_url).trials == []
    asked = Settings(resume="begun", storage=str(Path(begun.experiment.uri).parent), study=study_url)
    plan = plan_search(asked, {"resume", "storage", "study"})
    assert plan.study_url == study_url and f"--study {study_url}" in plan.resume_command


def test_a_search_that_is_ended_early_has_no_more_trials_than_it_asked_for(begun: Plan) -> None:
    """Found: "2 of 1 trials have ended", after --resume with fewer trials than had ended."""
    with read_plan(begun.experiment, set()).opened_study() as study:
        for _ in range(2):
            study.add_trial(create_trial(value=0.5, user_attrs={"configuration": {}, "outcome": "completed"}))
    found = read_results(begun.experiment)
    assert (found.done, found.settings["trials"]) == (2, 2)


def test_a_study_with_trials_and_no_search_is_named(begun: Plan) -> None:
    """Somebody has lost settings.yaml, and not the results."""
    with read_plan(begun.experiment, set()).opened_study() as study:
        study.ask()
    Path(begun.experiment.uri, "settings.yaml").unlink()
    with pytest.raises(StudyError, match=r"'begun' in .*begun/study\.journal already.*delete that study"):
        begun.opened_study().__enter__()


def test_what_belongs_to_one_run_is_not_taken_from_the_storage(begun: Plan) -> None:
    """A tracking server gets a password, and a cluster a token."""
    overwrite(begun, track="mlflow:http://elsewhere", address="elsewhere:6379", plan=True)
    settings = read_plan(begun.experiment, set()).settings
    assert (settings.track, settings.address, settings.plan) == (None, None, False)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_paths_of_a_remote_storage_are_given_again(
    command: list[str], begun: Plan, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "replay":
        with pytest.raises(SettingsError, match=f"give them again.* names: --data {phantoms}"):
            read_plan(Experiment.at(as_remote(begun), "begun"), set())
        return
    said = refused([*command, "--storage", as_remote(begun)], capsys)
    assert "others may write to it; give them again" in said and f"--data {phantoms}" in said


def test_paths_that_are_given_again_are_used_and_are_in_the_command_that_resumes(begun: Plan, phantoms: Path) -> None:
    asked = Settings(resume="begun", storage=as_remote(begun), data=phantoms)
    plan = plan_search(asked, {"resume", "storage", "data"})
    assert plan.settings.data == phantoms and f"--data {phantoms}" in plan.resume_command
    local = Settings(resume="begun", storage=str(Path(begun.experiment.uri).parent))
    assert "--data" not in plan_search(local, {"resume", "storage"}).resume_command


def test_a_resumed_search_keeps_its_space_wherever_a_copy_of_it_is(begun: Plan, tmp_path: Path) -> None:
    """Found: a file that had changed since was taken for the same by its path, and a copy for another one."""
    folder, copy = str(Path(begun.experiment.uri).parent), tmp_path / "copy.yaml"
    asked = Settings(resume="begun", storage=folder, space=copy)
    copy.write_text(f"# mine\n{begun.space_text}")
    assert plan_search(asked, {"resume", "storage", "space"}).space == begun.space
    copy.write_text("dropout: {low: 0, high: 0.1}")
    overwrite(begun, space=str(copy))
    with pytest.raises(SettingsError, match=r"cannot change space; it began with .*begun/space\.yaml"):
        plan_search(asked, {"resume", "storage", "space"})


def test_weights_that_have_moved_are_used_and_others_are_refused(begun: Plan, tmp_path: Path) -> None:
    """Found: on another machine they had to be under the same path, and under that path any others would do."""
    storage, weights = str(Path(begun.experiment.uri).parent), tmp_path / "resnet.pth"
    weights.write_bytes(b"these")
    overwrite(begun, weights="/where/they/were.pth")
    plan = plan_search(
        Settings(resume="begun", storage=storage, weights=str(weights)), {"resume", "storage", "weights"}
    )
    with plan.opened_study() as study:
        plan.check_weights(study)
        plan.check_weights(study)
        weights.write_bytes(b"those")
        with pytest.raises(PlanError, match=r"resnet\.pth are not those that begun started with"):
            plan.check_weights(study)
    with pytest.raises(SettingsError, match="cannot change weights"):
        plan_search(Settings(resume="begun", storage=storage, weights="none"), {"resume", "storage", "weights"})


def test_a_split_file_that_is_given_again_has_the_split_of_the_search(phantoms: Path, tmp_path: Path) -> None:
    """Found: an edited file was taken for the same by its path and ignored, and a copy for another one."""
    file, storage = tmp_path / "mine.csv", str(tmp_path)
    settings = Settings(data=phantoms, image_size=32, trials=1, epochs=1, weights="none", storage=storage)
    begun = plan_search(settings.model_copy(update={"name": "unsplit"}), set())
    file.write_bytes(begun.load_and_split().as_csv())
    begun = plan_search(settings.model_copy(update={"name": "begun", "split_file": file}), set())
    begun.save(begun.load_and_split())

    def resumed(file: Path) -> Plan:
        asked = Settings(resume="begun", storage=storage, split_file=file)
        return plan_search(asked, {"resume", "storage", "split_file"})

    copy = tmp_path / "copy.csv"
    shutil.copy(file, copy)
    for same in (file, copy):
        assert resumed(same).load_and_split().as_csv() == begun.load_and_split().as_csv()
    file.write_text(file.read_text().replace(",valid", ",train", 1))
    with pytest.raises(PlanError, match=r"mine\.csv is not the split that begun started with: 1 image in another part"):
        resumed(file).load_and_split()
    kept = plan_search(Settings(resume="begun", storage=storage), {"resume", "storage"}).load_and_split()
    assert kept.as_csv() == copy.read_bytes(), "a file that is not given again does not matter"


def test_a_judgement_says_what_is_trained_before_and_is_continued_as_one(
    begun: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found: trials that were left were trained first without a word. And stopped at its start it was not continued."""
    overwrite(begun, hold_test=True)
    storage = str(Path(begun.experiment.uri).parent)
    plan = plan_search(Settings(judge="begun", storage=storage), {"judge", "storage"})
    assert "--judge begun" in plan.resume_command and not plan.settings.hold_test
    plan = replace(plan, settings=plan.settings.model_copy(update={"trials": 9}))
    for ended in (0, 7, 9):
        print_start(plan, 1, ended, Console(width=200))
    nothing_ended, some, *more = capsys.readouterr().out.split("searching, 1 trial at a time")[1:]
    assert "0 of 9 trials have ended; the others run before the best is judged\n" in nothing_ended
    assert "7 of 9 trials have ended" in some and "to judge the best of those now, stop, and add --trials 7" in some
    assert not more, "with nothing left to train nothing is announced"
    print_start(plan, 1, 10, Console(width=200))
    assert capsys.readouterr().out == "10 trials had ended before, more than --trials 9: the best of all counts\n"
    plan = plan_search(Settings(resume="begun", storage=storage), {"resume", "storage"})
    assert "--resume begun" in plan.resume_command and plan.settings.hold_test


def test_the_command_to_continue_has_what_was_changed_and_not_yet_kept(begun: Plan) -> None:
    """Found: stopped while the images were read, `--judge NAME --trials 9` was continued with the trials of before."""
    asked = Settings(judge="begun", storage=str(Path(begun.experiment.uri).parent), trials=9, slots=1)
    plan = plan_search(asked, {"judge", "storage", "trials", "slots"})

    def said() -> str:
        with pytest.raises(KeyboardInterrupt) as stopped, plan.resumable():
            raise KeyboardInterrupt
        return stopped.value.__notes__[0]

    assert said().endswith(f"--judge begun --storage {asked.storage} --slots 1 --trials 9")
    plan.save(plan.load_and_split())
    assert said().endswith(f"--judge begun --storage {asked.storage}")


def test_images_that_have_moved_are_given_again_and_are_those_of_the_search(
    begun: Plan, phantoms: Path, tmp_path: Path
) -> None:
    overwrite(begun, data=str(tmp_path / "where they were"))
    storage = str(Path(begun.experiment.uri).parent)

    def resumed(data: Path) -> Plan:
        return plan_search(Settings(resume="begun", storage=storage, data=data), {"resume", "storage", "data"})

    assert resumed(phantoms).load_and_split().images.root == phantoms
    others = make_phantoms(tmp_path, seed=9, patients=30, size=48)
    with pytest.raises(PlanError, match="are not those that begun started with"):
        resumed(others).load_and_split()


def test_a_remote_search_does_not_replace_the_study_of_another_search_of_its_name(
    begun: Plan, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study of a remote search is in results/NAME of the working folder, where a local search may be."""
    monkeypatch.chdir(tmp_path)
    local = Path("results", "begun")
    local.mkdir(parents=True)
    asked = Settings(resume="begun", storage=as_remote(begun), data=phantoms)
    plan = plan_search(asked, {"resume", "storage", "data"})
    (local / "settings.yaml").touch()
    with pytest.raises(PlanError, match=r"results/begun has another search of this name.*in another folder"):
        plan_search(asked, {"resume", "storage", "data"})
    with pytest.raises(PlanError, match="has another search of this name"), plan.locked(print):
        pytest.fail("its study is about to be replaced")


def test_images_do_not_pass_for_those_of_a_search_without_a_fingerprint(begun: Plan) -> None:
    overwrite(begun, fingerprint=None)
    with pytest.raises(SettingsError, match=r"settings\.yaml is not one that a search wrote"):
        read_plan(begun.experiment, set())


def test_a_search_goes_on_with_the_class_map_with_which_it_has_begun(begun: Plan) -> None:
    """Earlier versions took a class map that named a folder that is not there."""
    class_map = {"nowhere": "normal"}
    with pytest.raises(DataError, match="is called 'nowhere'"):
        replace(begun, settings=begun.settings.model_copy(update={"class_map": class_map})).load_and_split()
    overwrite(begun, class_map=class_map)
    plan = read_plan(begun.experiment, set())
    assert plan.settings.class_map == class_map
    assert len(plan.load_and_split().split)
    assert not find_pictures(read_results(begun.experiment), None, is_local=True).missing
