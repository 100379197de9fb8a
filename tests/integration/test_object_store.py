"""Storage and data by URI: a real S3 protocol server, behind a proxy that now and then fails or stalls."""

from __future__ import annotations

import contextlib
import http.client
import pickle
import re
import sqlite3
from typing import TYPE_CHECKING

import pyarrow.fs
import pytest
from processes import wait_for
from s3 import KEY, SECRET, Faulty, put

from lungct_tune.data import DataError, fetch_images
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study_mirror import DatabaseMirror
from lungct_tune.filesystem import StorageError, resolve_filesystem
from lungct_tune.search import main

if TYPE_CHECKING:
    from pathlib import Path


# ---- single requests ----------------------------------------------------------------------------------


def test_a_request_is_repeated_through_errors_and_stalls_wherever_the_experiment_has_travelled(s3: Faulty) -> None:
    here = Experiment.at("s3://bucket/searches", "one")
    here.write("a/b", b"first")
    for experiment in (here, pickle.loads(pickle.dumps(here))):
        for fault in (500, 503, 429):
            s3.first(fault, times=4)  # more than pyarrow's own file system bears when it has travelled
            experiment.write("a/b", str(fault).encode())
            s3.first(fault, times=4)
            assert experiment.read("a/b") == str(fault).encode()
    s3.first("stall", times=1)
    assert here.read("a/b") == b"429"
    assert s3.answered["stall"] == 1 and s3.answered[503] == 16


def test_a_file_of_an_object_store_is_written_by_one_request(s3: Faulty) -> None:
    experiment = Experiment.at("s3://bucket/searches", "one")
    experiment.write("trials/0001/state-0002.pt", b"state")
    assert s3.answered == {None: 1}
    assert experiment.files() | {"a/b": 0} == {"trials/0001/state-0002.pt": 5, "a/b": 0}


def test_an_experiment_travels_with_the_address_of_its_server_and_without_credentials(
    s3: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.at("s3://bucket/searches", "two")
    experiment.write("a", b"x")
    sent = pickle.dumps(experiment)
    assert SECRET.encode() not in sent and KEY.encode() not in sent
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert pickle.loads(sent).read("a") == b"x"


def test_another_s3_than_amazons_is_not_waited_for_at_amazons_metadata_service(
    s3: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    metadata = Faulty(port=0)
    metadata.fault = lambda request: "stall"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
    Experiment.at("s3://bucket/searches", "three").write("a", b"x")
    assert not metadata.answered and s3.answered[None]
    metadata.ended.set()
    metadata.shutdown()


# ---- what is said where it cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "fault", "says"),
    [
        ("s3://nowhere/x", None, "there is no such bucket"),
        ("s3://bucket/x", 403, "permission denied"),
        ("s3://bucket/x", 503, "the server only answers with errors"),
    ],
)
def test_a_storage_that_refuses_is_named_with_the_likely_cause(
    s3: Faulty, monkeypatch: pytest.MonkeyPatch, storage: str, fault: int | None, says: str
) -> None:
    monkeypatch.setattr("lungct_tune.filesystem.ATTEMPTS", 2)
    s3.fault = lambda request: fault
    with pytest.raises(StorageError, match=rf"^{storage}/one: cannot write a: {says}") as refusal:
        Experiment.at(storage, "one").write("a", b"")
    assert SECRET not in str(refusal.value)
    with pytest.raises(DataError, match=rf"^--data {storage}: cannot list it: {says}"):
        fetch_images(storage)


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungct_tune.filesystem.ATTEMPTS", 2)
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "eu-north-1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="no server answers; check the network, and AWS_ENDPOINT_URL"):
        Experiment.at("s3://bucket/x", "one").exists("settings.yaml")


@pytest.mark.usefixtures("cluster")
def test_a_node_that_has_no_right_to_the_storage_or_gets_no_answer_is_named(
    s3: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of the cluster were started without the credentials that this process has since."""
    from lungct_tune.tuning.cluster import check_storage

    with pytest.raises(StorageError, match=r"^node [\d.]+: s3://bucket/\S+: cannot read \.probe: permission denied"):
        check_storage(Experiment.at("s3://bucket/searches", "checked"))
    monkeypatch.setattr("lungct_tune.tuning.cluster.STORAGE_CHECK_TIMEOUT_S", 3.0)
    s3.fault = lambda request: None if "Authorization" in request.headers else "stall"
    with pytest.raises(StorageError, match=r"^node [\d.]+: s3://bucket/\S+: no answer within 3 s"):
        check_storage(Experiment.at("s3://bucket/searches", "checked"))
    assert s3.answered["stall"]
    assert not Experiment.at("s3://bucket/searches", "checked").files()
    check_storage(Experiment.at(str(tmp_path), "checked"))
    assert not list((tmp_path / "checked").iterdir())


@pytest.mark.parametrize("flag", ["--storage", "--data"])
@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hush+hush@bucket/x",
        "s3://KEY:hu/sh@bucket/x",
        "s3://bucket/x?access_key=KEY&secret_key=hush",
        "fsspec+sftp://me:hush@host/x",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, uri: str
) -> None:
    with contextlib.chdir(tmp_path):
        assert main([flag, uri]) == 2
    said = capsys.readouterr()
    assert "credentials or a query" in said.err and "AWS_ENDPOINT_URL" in said.err
    assert "hu" not in said.out + said.err.replace("such", "") and not list(tmp_path.rglob("*"))


def test_a_path_may_have_a_colon_and_an_at_sign(s3: Faulty) -> None:
    experiment = Experiment.at("s3://bucket/x:y@z", "one")
    experiment.write("a", b"kept")
    assert experiment.read("a") == b"kept"


def test_google_is_asked_again_for_half_a_minute_and_named_as_the_user_did() -> None:
    for filesystem in (
        resolve_filesystem("gs://bucket/x")[0],
        pickle.loads(pickle.dumps(resolve_filesystem("gs://bucket/x")[0])),
    ):
        assert filesystem.__reduce__()[1][0]["retry_time_limit"].total_seconds() == 30
    with pytest.raises(StorageError, match=r"^gs://bad%zz/x: not understood \(Cannot parse URI: 'gs://bad%zz/x' due"):
        resolve_filesystem("gs://bad%zz/x")


# ---- images by URI ------------------------------------------------------------------------------------


def test_remote_images_are_fetched_once_and_followed(s3: Faulty, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/deep/3.png", "groups.csv"):
        put(f"bucket/followed/{name}", name.encode())

    def fetched() -> dict[str, bytes]:
        copy = fetch_images("s3://bucket/followed", tmp_path)
        return {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    assert fetched() == {name: name.encode() for name in ("a/1.png", "a/2.png", "b/deep/3.png", "groups.csv")}
    s3.answered.clear()
    assert len(fetched()) == 4 and s3.answered[None] == 1  # the listing

    put("bucket/followed/a/2.png", b"longer than before")
    put("bucket/followed/c/4.png", b"new")
    filesystem, _ = pyarrow.fs.FileSystem.from_uri("s3://bucket")
    filesystem.delete_file("bucket/followed/b/deep/3.png")
    s3.first(503, times=5)
    now = {"a/1.png": b"a/1.png", "a/2.png": b"longer than before", "c/4.png": b"new", "groups.csv": b"groups.csv"}
    assert fetched() == now
    assert not list(tmp_path.rglob("b"))


def test_an_interrupted_fetch_leaves_whole_files_and_goes_on(
    s3: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.filesystem.ATTEMPTS", 0)
    names = [f"a/{n:02d}.png" for n in range(40)]
    for name in names:
        put(f"bucket/interrupted/{name}", name.encode() * 1000)
    gets = iter(range(100))
    s3.fault = lambda request: 500 if request.command == "GET" and next(gets) > 20 else None
    with pytest.raises(DataError, match="--data s3://bucket/interrupted: cannot fetch it: the server only answers"):
        fetch_images("s3://bucket/interrupted", tmp_path)
    s3.fault = lambda request: None
    came = list(tmp_path.rglob("*.png"))
    assert came and all(path.read_bytes() == f"a/{path.name}".encode() * 1000 for path in came)
    s3.answered.clear()
    copy = fetch_images("s3://bucket/interrupted", tmp_path)
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*.*")) == names
    assert s3.answered.total() < 3 * (len(names) - len(came)) + 2


def test_remote_images_that_cannot_be_are_named(s3: Faulty, tmp_path: Path) -> None:
    upwards = http.client.HTTPConnection("127.0.0.1", s3.port)
    upwards.request("PUT", "/bucket/upwards/%2E%2E/%2E%2E/%2E%2E/out.png", b"x")
    assert upwards.getresponse().status == 200
    for place, says in {
        "s3://bucket/upwards": "cannot be a file's name here",
        "s3://bucket/nothing-here": "check that the folder or bucket exists",
        "nosuch://x": "not understood",
        "fsspec+nosuch://x": "Protocol not known: nosuch",
    }.items():
        with pytest.raises(DataError, match=f"^--data {re.escape(place)}: .*{says}"):
            fetch_images(place, tmp_path)


# ---- the study's copy ---------------------------------------------------------------------------------


def test_the_studys_copy_follows_it_through_a_failing_storage_and_replaces_an_older_study_only(
    s3: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.filesystem.ATTEMPTS", 0)
    experiment = Experiment.at("s3://bucket/searches", "copied")
    here, there = tmp_path / "here.db", tmp_path / "there.db"

    def rows(database: Path) -> int:
        with contextlib.closing(sqlite3.connect(database)) as study:
            return int(study.execute("SELECT COUNT(*) FROM epochs").fetchone()[0])

    def rows_of_the_copy() -> int:
        (tmp_path / "copy.db").write_bytes(experiment.read("study.db") or b"")
        return rows(tmp_path / "copy.db")

    def add(database: Path, *, table: bool = False) -> None:
        with contextlib.closing(sqlite3.connect(database)) as study, study:
            if table:
                study.execute("CREATE TABLE epochs (n INTEGER)")
            study.execute("INSERT INTO epochs VALUES (1)")

    with DatabaseMirror(experiment, here):
        add(here, table=True)
        wait_for(lambda: experiment.exists("study.db") and rows_of_the_copy() == 1)
        s3.fault = lambda request: 503 if request.command == "PUT" else None
        add(here)
        wait_for(lambda: s3.answered[503] > 1)
        add(here)
        s3.fault = lambda request: None
        wait_for(lambda: rows_of_the_copy() == 3)
        add(here)  # at the last moment
    assert rows_of_the_copy() == 4

    with DatabaseMirror(experiment, there):  # another machine goes on
        assert rows(there) == 4
        add(there)
    with DatabaseMirror(experiment, here):  # and then this one again
        assert rows(here) == 5
        s3.fault = lambda request: 503 if request.command == "PUT" else None
        add(here)  # and is stopped when the copy cannot be written
    s3.fault = lambda request: None
    with DatabaseMirror(experiment, here):
        assert rows(here) == 6
