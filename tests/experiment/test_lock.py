"""Only one process runs a search.

The storage is a real S3 protocol server. A machine is a working folder and a name.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from processes import wait_for

from lungct_tune.experiment import lock
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.lock import RUNNING, exclusive_lock
from lungct_tune.filesystem import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from s3 import Faulty


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Goes on as another machine."""
    monkeypatch.setattr(lock, "PERIOD_S", 0.2)
    monkeypatch.setattr(lock, "SETTLE_S", 0.2)
    monkeypatch.setattr(lock, "SILENT_S", 3.0)

    def go(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(lock.socket, "gethostname", lambda: name)

    return go


@pytest.fixture
def one(s3: Faulty) -> Iterator[Experiment]:
    experiment = Experiment.at("s3://bucket/locked", "one")
    yield experiment
    experiment.delete(RUNNING)


def test_a_search_that_another_machine_runs_is_refused(one: Experiment, on_machine: Callable[[str], None]) -> None:
    on_machine("here")
    with exclusive_lock(one):
        wait_for(lambda: one.exists(RUNNING), within_s=20)
        on_machine("there")
        with pytest.raises(StorageError, match="here is running one, in process"), exclusive_lock(one):
            pytest.fail("two machines run it")
    with exclusive_lock(one, pytest.fail):  # it has ended, so nothing is waited for
        pass
    assert not one.exists(RUNNING)


def test_a_search_that_runs_from_another_folder_of_this_machine_is_refused(
    one: Experiment, on_machine: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock's file is in the working folder."""
    on_machine("here")
    with exclusive_lock(one):
        wait_for(lambda: one.exists(RUNNING), within_s=20)
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        with pytest.raises(StorageError, match="here is running one, in process"), exclusive_lock(one):
            pytest.fail("two processes run it")


def test_of_two_machines_that_begin_at_the_same_moment_one_is_refused(
    one: Experiment, on_machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine("here")
    write = Experiment.write

    def write_and_be_overtaken(*arguments: Any) -> None:
        write(*arguments)
        write(one, RUNNING, json.dumps({"host": "there", "folder": "x", "process": 7, "times": 0}).encode())

    monkeypatch.setattr(Experiment, "write", write_and_be_overtaken)
    with pytest.raises(StorageError, match="there is running one, in process 7"), exclusive_lock(one):
        pytest.fail("two machines run it")
    assert b"there" in (one.read(RUNNING) or b""), "the other machine's file stays"


def test_a_search_whose_machine_has_crashed_goes_on_after_a_while(
    one: Experiment, on_machine: Callable[[str], None]
) -> None:
    one.write(RUNNING, json.dumps({"host": "gone", "process": 1, "times": 4}).encode())
    on_machine("here")
    said, began = list[str](), time.monotonic()
    with exclusive_lock(one, said.append):
        assert 3 <= time.monotonic() - began < 20
        wait_for(lambda: b"here" in (one.read(RUNNING) or b""), within_s=20)
    assert len(said) == 1 and said[0].startswith("gone has not ended one: looking for 3 s")


@pytest.mark.parametrize(
    "left", [b'{"host": "here", "process": 1, "times": 9}', b"notes", b"[]", b'{"host": "there"}', b""]
)
def test_what_a_crash_on_the_same_machine_or_another_program_has_left_is_not_waited_for(
    one: Experiment, on_machine: Callable[[str], None], left: bytes
) -> None:
    one.write(RUNNING, left)
    on_machine("here")
    with exclusive_lock(one, pytest.fail):
        pass


def test_a_storage_that_is_away_for_a_moment_does_not_end_a_search_that_runs(
    one: Experiment, on_machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [0]

    def refuse(*_: object) -> None:
        refusals[0] += 1
        raise StorageError("it is away")

    on_machine("here")
    with exclusive_lock(one):
        with monkeypatch.context() as patch:
            patch.setattr(Experiment, "write", refuse)
            wait_for(lambda: refusals[0] >= 2, within_s=20)
        one.delete(RUNNING)
        wait_for(lambda: one.exists(RUNNING), within_s=20)


def test_on_this_machine_a_second_process_is_refused(tmp_path: Path) -> None:
    experiment = Experiment.at(str(tmp_path), "one")
    with exclusive_lock(experiment):
        with pytest.raises(StorageError, match="another process is running one"), exclusive_lock(experiment):
            pytest.fail("two processes run it")
        assert not experiment.exists(RUNNING), "on a file system the lock itself is enough"


def test_a_lock_leaves_no_folder_on_a_machine_that_keeps_nothing_else_there(
    one: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: `clean s3://...` left results/NAME/.lock in the working folder."""
    monkeypatch.chdir(tmp_path)
    with exclusive_lock(one):
        assert one.local_folder.is_dir()
        with pytest.raises(StorageError, match="another process is running one"), exclusive_lock(one):
            pytest.fail("two processes run it")
    assert not list(tmp_path.iterdir())
    with exclusive_lock(one):
        (one.local_folder / "study.journal").touch()
    with exclusive_lock(one):
        pass
    assert (one.local_folder / "study.journal").exists()
