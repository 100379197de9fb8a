"""Storage and data by URI: a real S3 protocol server, behind a proxy that now and then fails or stalls."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import pickle
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pyarrow.fs
import pytest
from conftest import SMALL, SPACE
from optuna.trial import TrialState
from processes import free_port, searching, wait_for

from lungct_tune.data import DataError, fetch_images
from lungct_tune.experiment.bundle import verify
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study_mirror import StudyMirror
from lungct_tune.filesystem import StorageError, resolve_filesystem
from lungct_tune.search import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY, SECRET = "A-KEY-OF-THE-TESTS", "a-secret-of-the-tests"


class Faulty(ThreadingHTTPServer):
    """Passes requests on to a server, but those that `fault` has another answer for."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port, self.ended = port, threading.Event()
        self.fault: Callable[[BaseHTTPRequestHandler], int | str | None] = lambda request: None
        """An HTTP status to answer with, "stall" for no answer at all, or None to pass the request on."""
        self.answered: Counter[int | str | None] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def now_and_then(self, rates: dict[int | str, float], seed: int, stalls: set[int]) -> None:
        """Errors at these rates, and no answer at all to the requests of these numbers."""
        chance, number = random.Random(seed), itertools.count(1)

        def fault(request: BaseHTTPRequestHandler) -> int | str | None:
            if next(number) in stalls:
                return "stall"
            return next((error for error, rate in rates.items() if chance.random() < rate), None)

        self.fault = fault

    def first(self, fault: int | str, times: int) -> None:
        left = iter([fault] * times)
        self.fault = lambda request: next(left, None)


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *_: object) -> None:
        pass

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length)
            if len(content) < length:  # of a process that was killed: S3 keeps no half of an object, moto would
                raise ConnectionAbortedError
            return content
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _pass_on(self) -> None:
        content = self._content()
        fault = self.server.fault(self)
        self.server.answered[fault] += 1
        if fault == "stall":
            self.server.ended.wait(600)
            self.close_connection = True
        elif fault is not None:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            server = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            server.request(self.command, self.path, content, headers)
            answer = server.getresponse()
            body = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            server.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 server with the bucket `bucket`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("PUT", "/bucket")
                assert connection.getresponse().status == 200
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """The proxy before the S3 server, which this process takes for S3."""
    proxy = Faulty(server)
    for name, value in environment(proxy).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.ended.set()
    proxy.shutdown()
    proxy.server_close()


def environment(proxy: Faulty) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


def put(bucket_path: str, content: bytes) -> None:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(f"s3://{bucket_path}")
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


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
    experiment.write("trials/0001/last.pt", b"state")
    assert s3.answered == {None: 1}
    assert experiment.files() | {"a/b": 0} == {"trials/0001/last.pt": 5, "a/b": 0}


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
        ("s3://bucket/x", 403, "no right to"),
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
    with pytest.raises(StorageError, match="nobody answers there; look at the network, and at AWS_ENDPOINT_URL"):
        Experiment.at("s3://bucket/x", "one").exists("settings.yaml")


@pytest.mark.usefixtures("cluster")
def test_a_node_that_has_no_right_to_the_storage_or_gets_no_answer_is_named(
    s3: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of the cluster were started without the credentials that this process has since."""
    from lungct_tune.tuning.cluster import check_storage

    with pytest.raises(StorageError, match=r"^node [\d.]+: s3://bucket/\S+: cannot read \.probe: no right to"):
        check_storage(Experiment.at("s3://bucket/searches", "checked"))
    monkeypatch.setattr("lungct_tune.tuning.cluster.STORAGE_CHECK_TIMEOUT_S", 3.0)
    s3.fault = lambda request: None if "Authorization" in request.headers else "stall"
    with pytest.raises(StorageError, match=r"^node [\d.]+: s3://bucket/\S+: neither written nor refused within 3 s"):
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
        copy = fetch_images("s3://bucket/followed", tmp_path, progress=False)
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

    with StudyMirror(experiment, here):
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

    with StudyMirror(experiment, there):  # another machine goes on
        assert rows(there) == 4
        add(there)
    with StudyMirror(experiment, here):  # and then this one again
        assert rows(here) == 5
        s3.fault = lambda request: 503 if request.command == "PUT" else None
        add(here)  # and is stopped when the copy cannot be written
    s3.fault = lambda request: None
    with StudyMirror(experiment, here):
        assert rows(here) == 6


# ---- whole searches -----------------------------------------------------------------------------------

TRIALS = ["--trials", "3", "--epochs", "4"]


def test_a_search_on_a_failing_store_loses_no_trial_nor_does_the_loss_of_its_head(
    s3: Faulty, tmp_path: Path, phantoms: Path
) -> None:
    """Images and storage on S3; the head and its disk are lost in the middle, and another goes on."""
    for image in phantoms.rglob("*"):
        if image.is_file():
            put(f"bucket/ct/{image.relative_to(phantoms)}", image.read_bytes())
    (tmp_path / "space.yaml").write_text(SPACE)
    failing = Faulty(s3.port)
    failing.now_and_then({500: 0.05, 503: 0.05}, seed=1, stalls={100, 300, 500})
    store = ["--storage", "s3://bucket/searches"]
    begin = ["--name", "one", "--data", "s3://bucket/ct", "--space", str(tmp_path / "space.yaml"), *SMALL, *TRIALS]
    with contextlib.ExitStack() as heads:
        first, first_disk = heads.enter_context(head(failing, *store, *begin))
        wait_for(lambda: any(trial.user_attrs.get("history") for trial in copied_trials(tmp_path)), first)
        first.kill()
        outputs = [first.communicate()[0]]
        before = copied_trials(tmp_path)
        second, second_disk = heads.enter_context(head(failing, *store, "--resume", "one"))
        outputs.append(second.communicate(timeout=900)[0])
        assert second.returncode == 0, outputs
        print(*outputs, f"requests passed on and checksum_errors: {dict(failing.answered)}", sep="\n")

        trials = copied_trials(tmp_path)
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        for trial in trials:
            epochs = [figures["epoch"] for figures in trial.user_attrs["history"]]
            assert epochs == list(range(1, len(epochs) + 1))
        for had, has in zip(before, trials, strict=False):  # they went on
            epochs = had.user_attrs.get("history", [])
            assert has.user_attrs["history"][: len(epochs)] == epochs
        assert min(failing.answered[fault] for fault in (500, 503, "stall")) > 0

        experiment = Experiment.at("s3://bucket/searches", "one")
        files = {path: experiment.read(path) or b"" for path in experiment.files()}
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        for path, content in files.items():
            if path.startswith("best/"):
                (bundle / Path(path).name).write_bytes(content)
        verify(bundle)
        disks = [path for disk in (first_disk, second_disk) for path in disk.rglob("*") if path.is_file()]
        assert any(path.name == "runtime_env_agent.log" for path in disks)  # Ray's logs are among them
        for secret in (KEY, SECRET):
            assert all(secret not in output for output in outputs)
            assert all(secret.encode() not in content for content in files.values())
            assert all(secret.encode() not in path.read_bytes() for path in disks)


def copied_trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials in the copy of the study, which a head's loss leaves."""
    if (copy := Experiment.at("s3://bucket/searches", "one").read("study.db")) is None:
        return []
    (folder / "copy.db").write_bytes(copy)
    try:
        return optuna.load_study(study_name="one", storage=f"sqlite:///{folder}/copy.db").trials
    except KeyError:  # copied before there was a study in it
        return []


@contextlib.contextmanager
def head(proxy: Faulty, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A search on a machine of its own: its process, and the disk with its results, its cache and its Ray."""
    with tempfile.TemporaryDirectory(dir="/tmp") as disk:  # a short path, for the names of Ray's sockets
        own = {"RAY_ADDRESS": "local", "RAY_TMPDIR": disk, "XDG_CACHE_HOME": f"{disk}/cache"}
        with searching(*arguments, environment=os.environ | environment(proxy) | own, folder=Path(disk)) as run:
            yield run, Path(disk)


@pytest.fixture
def postgresql(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a PostgreSQL database that asks for a password; this process has it in its environment."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("Debian's package postgresql is not installed")
    user = "nobody" if os.getuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (password := Path(folder, "password")).write_text(SECRET)
        if user:
            shutil.chown(folder, user)
            shutil.chown(password, user)

        def run(program: str, *arguments: str) -> None:
            subprocess.run([programs[-1] / program, *arguments], user=user, cwd=folder, check=True, capture_output=True)

        run("initdb", "-D", f"{folder}/data", "-U", "me", "-A", "scram-sha-256", f"--pwfile={password}")
        port = free_port()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        run("pg_ctl", "start", "-w", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options)
        monkeypatch.setenv("PGPASSWORD", SECRET)
        try:
            yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-m", "immediate", "-D", f"{folder}/data")


@pytest.mark.usefixtures("cluster")
def test_a_study_in_postgresql_is_read_by_others_meanwhile_and_no_password_is_written(
    postgresql: str,
    tmp_path: Path,
    phantoms: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = optuna.storages.RDBStorage(postgresql)  # before the search, so that the two do not both make its tables
    seen: list[TrialState] = []

    def look_on() -> None:
        while not seen:
            time.sleep(0.2)
            with contextlib.suppress(KeyError):  # not begun yet
                trials = optuna.load_study(study_name="shared", storage=watched).trials
                seen.extend(trial.state for trial in trials if trial.intermediate_values)

    threading.Thread(target=look_on, daemon=True).start()
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["--data", str(phantoms), "--space", str(tmp_path / "space.yaml"), "--storage", str(tmp_path), *SMALL]
    one_long = ["--trials", "1", "--epochs", "10"]
    assert main([*arguments, *one_long, "--study", postgresql, "--name", "shared"]) == 0
    assert seen == [TrialState.RUNNING]
    trial, *_ = optuna.load_study(study_name="shared", storage=postgresql).trials
    assert trial.state == TrialState.COMPLETE and len(trial.intermediate_values) == 10

    monkeypatch.setenv("PGPASSWORD", "not it")
    assert main([*arguments, "--study", postgresql, "--name", "other"]) == 2
    said = capsys.readouterr()
    assert "password authentication failed" in said.err and postgresql in said.out
    assert SECRET not in said.out + said.err and "not it" not in said.out + said.err
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
