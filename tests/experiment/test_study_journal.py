"""The journal of a study: written late and in groups, whole after a crash, read by Optuna, copied in parts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lungct_tune.config.search_space import parse_space
from lungct_tune.experiment import study as study_module
from lungct_tune.experiment import study_journal, study_mirror
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import StudyError, load_study, open_study, sqlite_storage, told_as_user_errors
from lungct_tune.experiment.study_journal import JournalError, opened_journal
from lungct_tune.experiment.study_mirror import PARTS, JournalMirror, copy_study
from lungct_tune.filesystem import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

Lock = Callable[[float], subprocess.Popen[str]]
SMALL_SPACE = parse_space("truncation_depth: {low: 1, high: 8}\n", "space.yaml")


def add_trial(study: optuna.Study, value: float = 0.5) -> None:
    trial = study.ask()
    trial.set_user_attr("history", [{"epoch": 1}] * 3)
    trial.report(value, 1)
    study.tell(trial, value)


def read(file: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials, as Optuna's own backend reads them."""
    return optuna.load_study(study_name="one", storage=JournalStorage(JournalFileBackend(str(file)))).trials


def test_optuna_reads_the_file_while_it_is_written_and_after_it_was_continued(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    with opened_journal(file) as storage:
        study = optuna.create_study(storage=storage, study_name="one")
        add_trial(study)
        storage.sync()
        assert read(file) == study.trials
    with opened_journal(file) as storage:
        study = optuna.load_study(storage=storage, study_name="one")
        assert len(study.trials) == 1
        add_trial(study)
        assert len(study.trials) == 2
    assert read(file) == study.trials


def test_changes_reach_the_disk_soon_together_and_without_a_wait_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []

    def slow_disk(_: int) -> None:
        time.sleep(0.3)
        synced.append(time.monotonic())

    monkeypatch.setattr(study_journal.os, "fsync", slow_disk)
    with opened_journal(tmp_path / "study.journal") as storage:
        study = optuna.create_study(storage=storage, study_name="one")
        storage.sync()
        began = time.monotonic()
        for _ in range(20):
            add_trial(study)
        assert time.monotonic() - began < 0.3 * 20 / 4
        while len(read(tmp_path / "study.journal")) < 20:
            assert time.monotonic() - began < 5
            time.sleep(0.05)
        storage.sync()
    assert len(synced) < 20


def test_another_program_may_add_lines_such_as_the_notes_of_optuna_dashboard(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    with opened_journal(file) as storage:
        study = optuna.create_study(storage=storage, study_name="one")
        add_trial(study)
        storage.sync()
        beside = JournalStorage(JournalFileBackend(str(file)))
        optuna.load_study(study_name="one", storage=beside).set_user_attr("note", "look at trial 0")
        add_trial(study)
    with opened_journal(file) as storage:
        study = optuna.load_study(storage=storage, study_name="one")
        assert len(study.trials) == 2 and study.user_attrs == {"note": "look at trial 0"}


def test_a_line_that_a_crash_left_incomplete_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    with opened_journal(file) as storage:
        add_trial(optuna.create_study(storage=storage, study_name="one"))
    whole = file.read_bytes()
    for torn in (b'{"op_co', b'{"op_code":4,"study_id":0'):
        file.write_bytes(whole + torn)
        assert len(load_study(file, "one").trials) == 1
        with opened_journal(file) as storage:
            study = optuna.load_study(storage=storage, study_name="one")
            add_trial(study)
        assert len(read(file)) == 2
        assert file.read_bytes().startswith(whole + b'{"op_code":4,')


WRITE_UNTIL_KILLED = """
import sys, optuna
from pathlib import Path
from lungct_tune.experiment.study_journal import StudyStorage

storage = StudyStorage(Path(sys.argv[1]))
study = optuna.create_study(storage=storage, study_name="one")
while True:
    trial = study.ask()
    study.tell(trial, trial.number)
    if trial.number % 50 == 49:
        storage.sync()
        print(trial.number, flush=True)
"""


def test_what_was_synced_outlives_a_kill_at_any_moment(tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(file)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    synced = [int(process.stdout.readline()) for _ in range(3)][-1]
    process.send_signal(signal.SIGKILL)
    synced = max([synced, *(int(line) for line in process.stdout)])
    process.wait()
    with opened_journal(file) as storage:
        trials = optuna.load_study(storage=storage, study_name="one").trials
    assert [trial.value for trial in trials[: synced + 1]] == list(range(synced + 1))
    assert [trial.number for trial in trials] == list(range(len(trials)))


def test_a_journal_that_is_deleted_while_it_is_written_is_said(tmp_path: Path) -> None:
    """What is written to a deleted file is lost without an error of the system."""
    file = tmp_path / "study.journal"
    with pytest.raises(JournalError, match="it has been deleted or moved"), opened_journal(file):
        file.unlink()


def test_a_journal_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be opened"), opened_journal(tmp_path / "nowhere" / "study.journal"):
        pass
    for foreign in (b"notes\n", b"[1]\n"):
        (tmp_path / "study.journal").write_bytes(foreign)
        with pytest.raises(JournalError, match="is damaged"), opened_journal(tmp_path / "study.journal"):
            pass


# ---- the copy on remote storage -------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path) -> Experiment:
    """A storage that is reached by a URI, as an object store is."""
    return Experiment(f"fsspec+file://{tmp_path}/remote/one")


def copied(experiment: Experiment, folder: Path) -> list[optuna.trial.FrozenTrial]:
    folder.mkdir(exist_ok=True)
    file = copy_study(experiment, folder)
    assert file is not None and file.name == "study.journal"
    return read(file)


def search(experiment: Experiment, file: Path, trials: int) -> list[optuna.trial.FrozenTrial]:
    """Adds trials to a study whose copy is kept."""
    with JournalMirror(experiment, file), opened_journal(file) as storage:
        try:
            study = optuna.load_study(storage=storage, study_name="one")
        except KeyError:
            study = optuna.create_study(storage=storage, study_name="one")
        for _ in range(trials):
            add_trial(study)
        return study.trials


def test_a_study_that_cannot_be_read_for_a_moment_is_copied_later(
    remote: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ended without a word."""
    monkeypatch.setattr(study_mirror, "PERIOD_S", 0.01)
    file, aside, folder = tmp_path / "study.journal", tmp_path / "aside", tmp_path / "copy"
    file.write_bytes(b"1\n")
    folder.mkdir()
    with JournalMirror(remote, file):
        file.rename(aside)
        file.mkdir()
        time.sleep(0.1)
        file.rmdir()
        aside.rename(file)
        file.write_bytes(b"1\n2\n")
    copy = copy_study(remote, folder)
    assert copy is not None and copy.read_bytes() == b"1\n2\n"


def test_the_copy_grows_in_parts_of_which_only_the_last_is_written_again(
    remote: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_mirror, "PART_BYTES", 4000)
    monkeypatch.setattr(study_mirror, "PERIOD_S", 0.01)
    written: list[tuple[str, int]] = []
    write = Experiment.write

    def note(self: Experiment, path: str, content: bytes) -> None:
        written.append((path, len(content)))
        write(self, path, content)

    monkeypatch.setattr(Experiment, "write", note)
    file = tmp_path / "study.journal"
    with JournalMirror(remote, file), opened_journal(file) as storage:
        study = optuna.create_study(storage=storage, study_name="one")
        for number in range(30):
            add_trial(study)
            storage.sync()
            time.sleep(0.03)
            if number % 10 == 9:
                assert copied(remote, tmp_path / "copy")
    assert copied(remote, tmp_path / "copy") == read(file)
    parts = remote.files(PARTS)
    assert len(parts) > 3 and sum(parts.values()) == file.stat().st_size
    assert max(size for _, size in written) < 4000 + 2000
    assert [path for path, _ in written] == sorted(path for path, _ in written)  # a complete part is left alone
    first = remote.read(min(parts)) or b""
    for damaged in (b"", first[: first.rfind(b"\n", 0, -1) + 1]):  # lost, cut at the end of a line
        remote.write(min(parts), damaged)
        with pytest.raises(StorageError, match=f"is not whole: .* has {len(damaged)} bytes instead of {len(first)};"):
            copied(remote, tmp_path / "copy")


def test_another_machine_goes_on_from_the_copy_and_then_the_first_one_again(remote: Experiment, tmp_path: Path) -> None:
    here, there = tmp_path / "here.journal", tmp_path / "there.journal"
    assert len(search(remote, here, 2)) == 2
    with opened_journal(here) as storage:  # the copy does not get this trial: the machine was lost before
        add_trial(optuna.load_study(storage=storage, study_name="one"), value=0.125)
    assert len(search(remote, there, 3)) == 5
    trials = search(remote, here, 1)
    assert len(trials) == 6 and 0.125 not in [trial.value for trial in trials]
    assert copied(remote, tmp_path / "copy") == trials == read(here)


def test_a_study_that_is_ahead_of_its_copy_is_kept(remote: Experiment, tmp_path: Path) -> None:
    file = tmp_path / "study.journal"
    search(remote, file, 2)
    with opened_journal(file) as storage:
        add_trial(optuna.load_study(storage=storage, study_name="one"), value=0.125)
    trials = search(remote, file, 0)
    assert [trial.value for trial in trials] == [0.5, 0.5, 0.125]
    assert copied(remote, tmp_path / "copy") == trials


def test_files_of_other_names_among_the_parts_are_ignored(remote: Experiment, tmp_path: Path) -> None:
    trials: list[Any] = search(remote, tmp_path / "study.journal", 2)
    remote.write(f"{PARTS}/notes.txt", b"x")
    assert copied(remote, tmp_path / "copy") == trials


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fills a file system to its last byte; returns the file that does."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "filler"


def test_a_study_waits_for_a_full_disk_and_has_every_change_after_it(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = small_disk / "study.journal"
    with opened_journal(file) as storage:
        study = optuna.create_study(storage=storage, study_name="one")
        add_trial(study)
        storage.sync()
        filler = fill(small_disk)
        for _ in range(20):  # more than the page that the file has already
            add_trial(study)
        assert len(study.trials) == 21  # the search goes on meanwhile
        time.sleep(1)
        assert len(read(file)) < 21
        filler.unlink()
        storage.sync()
        assert read(file) == study.trials
    full, again = (record.getMessage() for record in caplog.records)
    assert full.startswith(f"the study {file} cannot be written: the disk is full.") and again.endswith("written again")


def test_a_study_on_a_disk_that_stays_full_is_an_error_in_one_sentence(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_journal, "FULL_S", 1.0)
    file = small_disk / "study.journal"

    def search() -> None:
        with opened_journal(file) as storage:
            study = optuna.create_study(storage=storage, study_name="one")
            storage.sync()
            fill(small_disk)
            for _ in range(20):
                add_trial(study)
            storage.sync()

    with pytest.raises(JournalError) as stop:
        search()
    assert str(stop.value).startswith(f"the study {file} cannot be written: the disk is full. The search stops")
    assert "\n" not in str(stop.value)
    (small_disk / "filler").unlink()
    with opened_journal(file) as storage:  # what was written before can be continued
        add_trial(optuna.load_study(storage=storage, study_name="one"))


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Lock]:
    """Locks a SQLite file in another process for some seconds, as a browser of databases does with a change in work."""
    program = """
import sqlite3, sys, time
held = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
held.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
held.execute("ROLLBACK")
"""
    with contextlib.ExitStack() as held:

        def hold(seconds: float) -> subprocess.Popen[str]:
            words = [sys.executable, "-c", program, str(tmp_path / "study.db"), str(seconds)]
            process = held.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
            held.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            return process

        yield hold


def test_a_study_in_sqlite_waits_until_another_program_unlocks_it(tmp_path: Path, lock: Lock) -> None:
    study = open_study(f"sqlite:///{tmp_path}/study.db", "one", SMALL_SPACE, 4, new=True)
    holder = lock(5.5)  # sqlite3 by itself waits for 5 s
    study.set_user_attr("wall_s", 1.0)
    assert holder.wait(5) == 0 and study.user_attrs["wall_s"] == 1.0


@pytest.mark.parametrize("as_url", [True, False])
def test_a_study_in_sqlite_that_stays_locked_is_an_error_in_one_sentence(
    tmp_path: Path, lock: Lock, as_url: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "LOCKED_S", 1.0)
    file = tmp_path / "study.db"
    where = f"sqlite:///{file}"
    study = open_study(where if as_url else sqlite_storage(file), "one", SMALL_SPACE, 4, new=True)
    lock(60)
    with pytest.raises(StudyError) as stop, told_as_user_errors(where):
        study.set_user_attr("wall_s", 2.0)
    assert str(stop.value) == (
        f"the study in {where} cannot be used: database is locked for 1 s; close the program that has it open"
    )
