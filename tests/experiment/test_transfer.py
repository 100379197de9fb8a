"""Pulling from folders: what comes, what is refused, and what a search that runs meanwhile does to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shlex
import shutil
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import JUDGED, begun, contents, files_of_a_bundle, finished
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct_tune.cli import command_words
from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.experiment.bundle import checksum_errors, find_bundle, verify, write_bundle, write_so_far
from lungct_tune.experiment.transfer import BEGUN, LOCK, beginning
from lungct_tune.experiment.trial import EpochFigures, Outcome, TrialRecord
from lungct_tune.pull import main

# ---- what is pulled, from where, to where --------------------------------------------------------------


def test_a_bundle_is_pulled_verified_and_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "results")
    dest = tmp_path / "my model"
    assert main([f"{tmp_path}/results/one", str(dest)]) == 0
    assert contents(dest) == contents(tmp_path / "results" / "one" / "best")
    assert sorted(os.listdir(tmp_path)) == ["my model", "results"]
    said = capsys.readouterr().out
    assert "trial 3: depth 20, 0 frozen, dropout 0.50" in said
    low, high = JUDGED.accuracy.ci95
    assert f"test accuracy 0.750 ({low:.3f} to {high:.3f}), 8 images in 8 groups" in said
    row = next(line for line in said.splitlines() if "always normal" in line)
    assert " 0.250 " in row, row
    assert PHANTOMS in said
    use = next(line for line in said.splitlines() if line.startswith("use it: ")).removeprefix("use it: ")
    assert shlex.split(use) == [*command_words("predict"), str(dest), "IMAGE"]
    check = next(line for line in said.splitlines() if line.startswith("check it: ")).removeprefix("check it: ")
    assert subprocess.run(check, shell=True, capture_output=True).returncode == 0
    (dest / "metrics.json").write_text("{}")
    assert subprocess.run(check, shell=True, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    "source",
    [["one"], ["one", "--storage", "elsewhere"], ["results/one"], ["results/one/"], ["results/one/best"], ["URI"]],
)
def test_an_experiment_is_a_name_a_path_or_a_uri(
    tmp_path: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / ("elsewhere" if "elsewhere" in source else "results"))
    assert main([f"file://{tmp_path}/results/one" if word == "URI" else word for word in source]) == 0
    verify(tmp_path / "one")


def test_a_bundle_that_is_there_already_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    pull = [f"{tmp_path}/one", str(tmp_path / "model")]
    assert main(pull) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    assert main(pull) == 0
    assert "holds this bundle already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("there", ["model", "model/notes.txt", "model.part/notes.txt", "damaged"])
def test_what_is_in_the_way_is_never_touched(tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    pull = [f"{tmp_path}/one", str(tmp_path / "model")]
    if there == "damaged":
        assert main(pull) == 0
        there = "model/config.json"
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    assert main(pull) == 2
    assert "another DEST" in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "mine"


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path, "2026-phantoms")
    (tmp_path / "no-experiment").mkdir()
    assert main(["two", "--storage", str(tmp_path)]) == 2
    assert f"no experiment 'two' in {tmp_path}; there are: 2026-phantoms\n" in capsys.readouterr().err
    assert main(["two", "--storage", f"{tmp_path}/no-experiment"]) == 2
    assert "there are no experiments" in capsys.readouterr().err
    assert main(["two", "--storage", f"{tmp_path}/nowhere"]) == 2
    assert f"no experiment 'two' in {tmp_path}/nowhere; there are no experiments" in capsys.readouterr().err
    assert main(["two", "--storage", "~nobody-here/x"]) == 2
    assert "~nobody-here/x; there are no experiments" in capsys.readouterr().err
    assert main(["2026-phantoms", str(tmp_path / "model"), "--storage", str(tmp_path)]) == 2
    assert "no trial has completed yet" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["2026-phantoms", "no-experiment"]


@pytest.mark.parametrize("dest", [".", "/"])
def test_a_folder_without_a_name_is_in_the_way_like_any_other(
    tmp_path: Path, dest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path)
    assert main([f"{tmp_path}/one", dest]) == 2
    assert f"{dest} already exists and was not changed. Give another DEST" in capsys.readouterr().err


def test_the_folder_above_is_a_path_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    (tmp_path / "one" / "results").mkdir()
    monkeypatch.chdir(tmp_path / "one" / "results")
    assert main(["..", str(tmp_path / "model")]) == 0
    verify(tmp_path / "model")


def test_one_pull_at_a_time_fills_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    finished(tmp_path)
    (tmp_path / "model.part").mkdir()
    with (tmp_path / "model.part" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 2
    assert "another pull is writing" in capsys.readouterr().err
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 0


def test_a_full_disk_is_said_and_the_next_attempt_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path, model=os.urandom(10 * 2**20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, limits[1]))  # no file may grow beyond
    try:
        assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 0
    verify(tmp_path / "model")


# ---- damage ---------------------------------------------------------------------------------------------


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def lose_a_line(file: Path) -> None:
    (file.parent / "checksums.txt").write_text(
        "".join(line for line in (file.parent / "checksums.txt").open() if file.name not in line)
    )


DAMAGES = {"cut off": cut_off, "altered": alter, "missing": Path.unlink, "not vouched for": lose_a_line}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "trials.csv"])
def test_a_damaged_bundle_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, damage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, pull = finished(tmp_path), [f"{tmp_path}/one", str(tmp_path / "model")]
    DAMAGES[damage](tmp_path / "one" / "best" / name)
    assert main(pull) == 2
    assert f"{experiment.uri}/best/{name}: " in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    shutil.rmtree(tmp_path / "one" / "best")
    write_bundle(experiment, files_of_a_bundle())
    assert main(pull) == 0  # what was refused does not spoil what is right
    verify(tmp_path / "model")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", "sub/evil"])
def test_checksums_that_lead_out_of_the_folder_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path)
    sums = tmp_path / "one" / "best" / "checksums.txt"
    sums.write_text(f"{hashlib.sha256(b'').hexdigest()}  {name}\n{sums.read_text()}")
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 2
    assert "is not the checksum of a file beside it" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_links_that_lie_in_wait_are_not_written_through(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "precious").write_text("mine")
    part = tmp_path / "model.part"
    part.mkdir()
    (part / LOCK).touch()
    (part / "trials.csv").symlink_to(tmp_path / "precious")
    (part / "folder").symlink_to(tmp_path)
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 0
    verify(tmp_path / "model")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "one" / "best").is_dir()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_was_left_and_whatever_is_damaged_dest_is_absent_or_right(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    experiment = finished(root, model=data.draw(st.binary(min_size=1, max_size=40)))
    best, part, dest = root / "one" / "best", root / "model.part", root / "model"
    right = contents(best)
    names = [*right, "stranger", "folder/stranger"]
    for name, left in data.draw(st.dictionaries(st.sampled_from(names), st.binary(max_size=50))).items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / LOCK).touch()
        (part / name).write_bytes(left)
        if name in right:  # what looks like it, or like its beginning, and may be so
            info = experiment.info(f"best/{name}")
            os.utime(part / name, ns=(info.mtime_ns, info.mtime_ns))
            (part / BEGUN).mkdir(exist_ok=True)
            beginning(part / BEGUN, info).write_bytes(data.draw(st.sampled_from([left, right[name][: len(left)]])))
    if (damage := data.draw(st.sampled_from([None, *DAMAGES.values()]))) is not None:
        damage(best / data.draw(st.sampled_from(sorted(right))))
    whole = not any(checksum_errors(best))
    assert main([experiment.uri, str(dest)]) == (0 if whole else 2)
    assert dest.exists() == whole
    if whole:
        assert contents(dest) == contents(best)
        assert not part.exists()


# ---- in the middle of a search --------------------------------------------------------------------------


def test_before_the_end_the_best_so_far_is_pulled_and_called_unjudged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = begun(tmp_path)
    write_so_far(experiment, files_of_a_bundle(b"first", test=None), trials=1)
    write_so_far(experiment, files_of_a_bundle(b"second", test=None), trials=5)
    write_so_far(experiment, files_of_a_bundle(b"third", test=None), trials=12)
    assert sorted(os.listdir(tmp_path / "one" / "so_far")) == ["000005", "000012"]
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"third"
    said = capsys.readouterr().out
    assert "best of the first 5 of 8 trials" in said and "balanced accuracy of 0.875 on validation" in said
    assert "not been evaluated on the test split" in said and "test accuracy" not in said
    write_bundle(experiment, files_of_a_bundle(b"judged"))
    assert main([f"{tmp_path}/one", str(tmp_path / "model")]) == 2  # the earlier one is not overwritten
    assert main([f"{tmp_path}/one", str(tmp_path / "judged")]) == 0
    assert "test accuracy 0.750" in capsys.readouterr().out


def test_a_bundle_that_is_replaced_while_it_is_pulled_is_pulled_whole(tmp_path: Path) -> None:
    experiment, ended = begun(tmp_path), threading.Event()

    def replace() -> None:
        trials = 0
        while not ended.is_set():
            trials += 1
            write_so_far(experiment, files_of_a_bundle(os.urandom(1) * 2**20, test=None), trials)
            ended.wait(0.03)

    search = threading.Thread(target=replace)
    search.start()
    try:
        while not any((tmp_path / "one").glob("so_far/*/checksums.txt")):
            time.sleep(0.01)
        for i in range(20):
            assert main([f"{tmp_path}/one", str(tmp_path / f"model{i}")]) == 0
            verify(tmp_path / f"model{i}")
    finally:
        ended.set()
        search.join()


def test_a_storage_that_fails_for_a_moment_costs_no_search_and_no_bundle_so_far(tmp_path: Path) -> None:
    from lungct_tune.tuning.callbacks.best_so_far import BestSoFarCallback
    from lungct_tune.tuning.tally import SearchTally

    experiment, tally, threads = begun(tmp_path), SearchTally(()), ThreadPoolExecutor(1)
    kept = BestSoFarCallback(tally, experiment, threads, lambda trial, weights: files_of_a_bundle(weights, test=None))

    def end(outcome: Outcome, score: float) -> None:
        figures = EpochFigures(
            epoch=1, balanced_accuracy=score, accuracy=score, log_loss=1.0, train_loss=1.0, train_s=1.0, valid_s=0.1
        )
        number = tally.finished
        experiment.write(f"trials/{number:04d}/model.safetensors", f"weights {score}".encode())
        tally.add(TrialRecord(number, PUBLISHED, (figures,), outcome))
        kept.on_trial_complete(0, [], None)
        threads.submit(int).result()

    def weights_so_far() -> list[bytes]:
        found = find_bundle(experiment)
        return [(tmp_path / "one" / found / "model.safetensors").read_bytes()] if found else []

    end(Outcome.STOPPED, 0.9)
    assert not weights_so_far()
    (tmp_path / "one" / "so_far").write_text("in the way of a folder")
    end(Outcome.COMPLETED, 0.5)
    (tmp_path / "one" / "so_far").unlink()
    end(Outcome.COMPLETED, 0.4)
    assert weights_so_far() == [b"weights 0.5"]
    end(Outcome.COMPLETED, 0.6)
    assert weights_so_far() == [b"weights 0.6"]


# ---- everything -----------------------------------------------------------------------------------------


def test_all_is_an_experiment_with_a_verified_bundle_and_a_study_as_it_was_at_one_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search writes to its study all the time: in every copy, both tables know of the same trials."""
    experiment, ended = finished(tmp_path / "results"), threading.Event()
    experiment.write("trials/0003/model.safetensors", b"weights")
    temporary = (".lock", "best.part/x", "search-images.npy", "study.db-journal")
    for transient in ("trials/0003/state-0002.pt.12ab.part", *temporary):
        experiment.write(transient, b"")

    with contextlib.closing(sqlite3.connect(f"{experiment.uri}/study.db")) as study:
        study.executescript("CREATE TABLE trials (filler); CREATE TABLE epochs (filler)")

    def write_trials() -> None:
        with contextlib.closing(sqlite3.connect(f"{experiment.uri}/study.db", timeout=60)) as study:
            while not ended.wait(0.001):
                with study:
                    study.execute("INSERT INTO trials VALUES (zeroblob(3000))")
                    study.execute("INSERT INTO epochs VALUES (zeroblob(3000))")

    search = threading.Thread(target=write_trials)
    search.start()
    try:
        for i in range(5):
            dest = tmp_path / str(i) / "one"
            assert main([experiment.uri, str(dest), "--all"]) == 0
            verify(dest / "best")
            assert set(contents(dest)) == {
                *("settings.yaml", "study.db", "trials/0003/model.safetensors"),
                *(f"best/{name}" for name in [*files_of_a_bundle(), "checksums.txt"]),
            }
            with contextlib.closing(sqlite3.connect(dest / "study.db")) as study:
                counts = "SELECT (SELECT COUNT(*) FROM trials), (SELECT COUNT(*) FROM epochs)"
                trials, epochs = study.execute(counts).fetchone()
                assert trials == epochs
                assert study.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        ended.set()
        search.join()
    assert f"lungct_tune.predict {dest}/best IMAGE" in capsys.readouterr().out
    assert main([experiment.uri, str(dest), "--all"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_all_comes_with_the_journal_of_a_study_that_grows_meanwhile(tmp_path: Path) -> None:
    import optuna

    from lungct_tune.experiment.study import load_study
    from lungct_tune.experiment.study_journal import opened_journal

    experiment, ended = finished(tmp_path / "results"), threading.Event()

    def search() -> None:
        with opened_journal(Path(experiment.uri, "study.journal")) as storage:
            study = optuna.create_study(storage=storage, study_name="one")
            while not ended.is_set():
                study.tell(study.ask(), 0.5)

    running = threading.Thread(target=search)
    running.start()
    try:
        for i in range(3):
            wait_until = time.monotonic() + 10
            while not Path(experiment.uri, "study.journal").exists() and time.monotonic() < wait_until:
                time.sleep(0.01)
            time.sleep(0.3)
            assert main([experiment.uri, str(tmp_path / str(i)), "--all"]) == 0
            numbers = [trial.number for trial in load_study(tmp_path / str(i) / "study.journal", "one").trials]
            assert numbers and numbers == list(range(len(numbers)))
    finally:
        ended.set()
        running.join()


def test_all_of_a_damaged_experiment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = finished(tmp_path)
    cut_off(tmp_path / "one" / "best" / "model.safetensors")
    assert main([experiment.uri, str(tmp_path / "copy"), "--all"]) == 2
    assert f"{experiment.uri}/best/model.safetensors: not the file that was written" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
