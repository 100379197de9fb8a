"""Pulling from an object store, over a line that is slow or breaks, and from the head of a cluster."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bundles import begun, files_of_a_bundle, finished

from lungct_tune.experiment import transfer
from lungct_tune.experiment.bundle import verify, write_bundle, write_so_far
from lungct_tune.experiment.folder import CHUNK, Experiment, old_state_file, state_file
from lungct_tune.experiment.study_mirror import copy_study
from lungct_tune.filesystem import StorageError
from lungct_tune.pull import main

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


class Line:
    """A TCP line to a server on this machine, which counts what it carries from there, and can be made worse."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.mend()
        threading.Thread(target=self._accept, daemon=True).start()

    def mend(self) -> None:
        self.carried, self.slow_after, self.broken_after = 0, sys.maxsize, sys.maxsize

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                threading.Thread(target=self._carry, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(2**16)) and self.carried < self.broken_after:
                target.sendall(data)
                if counted:
                    self.carried += len(data)
                    if self.carried > self.slow_after:
                        time.sleep(0.02)  # about 3 MiB/s
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # the other direction's thread wakes up too
            end.close()

    def close(self) -> None:
        self._listener.close()


def arrived(part: Path) -> int:
    return sum(path.stat().st_size for path in part.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def line(s3_server: int) -> Iterator[Line]:
    """The line to an S3 server with the bucket `bucket`, which pyarrow and the processes started here use."""
    line = Line(s3_server)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "someone")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield line
    line.close()


@pytest.fixture
def bucket(line: Line, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    line.mend()
    return f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"


def test_a_bundle_comes_from_an_object_store_and_what_is_not_there_is_said(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = begun(bucket)
    write_so_far(experiment, files_of_a_bundle(test=None), trials=1)
    assert main([f"{bucket}/one", str(tmp_path / "so_far")]) == 0
    assert "not been evaluated" in capsys.readouterr().out
    write_bundle(experiment, files_of_a_bundle(b"judged"))
    assert main([f"{bucket}/one/best", str(tmp_path / "model")]) == 0
    verify(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"judged"
    assert main([f"{bucket}/one", str(tmp_path / "all"), "--all"]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"settings.yaml", "so_far", "best"}
    assert main([f"{bucket}/two", str(tmp_path / "two")]) == 2
    assert "there are: one" in capsys.readouterr().err
    assert main(["s3://no-such-bucket/one", str(tmp_path / "two")]) == 2
    assert "no-such-bucket" in capsys.readouterr().err


def test_all_of_a_search_that_never_rests_comes_with_a_whole_study_and_what_rests(
    bucket: str, line: Line, tmp_path: Path
) -> None:
    """The study's copy and the states of running trials change faster than anybody can fetch them.

    Trial 4 has a state of version 0.1, which is replaced. Trial 5 has one as now: it is deleted after the next ones.
    """
    experiment, ended = finished(bucket), threading.Event()
    experiment.write("trials/0003/model.safetensors", b"weights")

    def search() -> None:
        with contextlib.closing(sqlite3.connect(":memory:")) as study:
            study.executescript("CREATE TABLE epochs (filler); INSERT INTO epochs VALUES (zeroblob(500000))")
            stop = time.monotonic() + 60
            for epoch in itertools.count(1):
                if ended.is_set() or time.monotonic() > stop:
                    return
                study.execute("INSERT INTO epochs VALUES (zeroblob(5000))")
                study.commit()
                experiment.write("study.db", study.serialize())
                experiment.write(old_state_file(4, 0), os.urandom(500_000))
                experiment.write(state_file(5, epoch), os.urandom(500_000))
                experiment.delete(state_file(5, epoch - 2))

    running = threading.Thread(target=search)
    running.start()
    try:
        while not experiment.exists(state_file(5, 2)):
            time.sleep(0.01)
        line.slow_after = 0
        for dest in (tmp_path / "1", tmp_path / "2"):
            assert main([f"{bucket}/one", str(dest), "--all"]) == 0
            assert running.is_alive()
            verify(dest / "best")
            assert (dest / "trials" / "0003" / "model.safetensors").read_bytes() == b"weights"
            assert {state.stat().st_size for state in dest.glob("trials/*/*.pt")} == {500_000}
            with contextlib.closing(sqlite3.connect(dest / "study.db")) as copy:
                assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        ended.set()
        running.join()


def test_all_has_the_files_of_a_trial_that_ends_before_the_study_is_copied(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(bucket)

    def end_a_trial_and_copy(experiment: Experiment, folder: Path) -> Path | None:
        experiment.write("trials/0003/model.safetensors", b"weights")
        experiment.write("study/000000000000.journal", b"trial 3 has ended\n")
        return copy_study(experiment, folder)

    monkeypatch.setattr(transfer, "copy_study", end_a_trial_and_copy)
    assert main([f"{bucket}/one", str(tmp_path / "all"), "--all"]) == 0
    assert (tmp_path / "all" / "study.journal").read_bytes() == b"trial 3 has ended\n"
    assert (tmp_path / "all" / "trials" / "0003" / "model.safetensors").read_bytes() == b"weights"


def test_a_file_that_is_deleted_while_it_is_read_is_not_there_and_no_other_fault(bucket: str) -> None:
    experiment = begun(bucket)
    experiment.write("trials/0003/state-0001.pt", bytes(2 * CHUNK))
    chunks = experiment.chunks("trials/0003/state-0001.pt")
    assert next(chunks) == bytes(CHUNK)
    experiment.delete("trials/0003/state-0001.pt")
    with pytest.raises(StorageError, match="cannot read trials") as raised:
        next(chunks)
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_a_file_whose_name_leads_out_of_the_experiment_is_refused(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    finished(bucket)
    folder = bucket.removeprefix("s3://bucket/")
    boto3.client("s3").put_object(Bucket="bucket", Key=f"{folder}/one/best/../../evil", Body=b"")
    assert main([f"{bucket}/one", str(tmp_path / "in" / "model"), "--all"]) == 2
    assert "points outside the experiment's folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("evil"))


def test_after_a_break_in_the_line_a_pull_goes_on_where_it_was(
    bucket: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungct_tune.filesystem.ATTEMPTS", 3)
    model = os.urandom(16 * MIB)
    finished(bucket, model)
    line.carried, line.broken_after = 0, 10 * MIB
    pull = [f"{bucket}/one", str(tmp_path / "model")]
    assert main(pull) == 2
    said = capsys.readouterr().err
    assert "cannot read best/model.safetensors" in said and "Run the same command again to continue" in said
    assert not (tmp_path / "model").exists()
    kept = arrived(tmp_path / "model.part")
    assert 4 * MIB <= kept <= 10 * MIB
    line.mend()
    assert main(pull) == 0
    assert line.carried < len(model) - kept + MIB
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    verify(tmp_path / "model")
    assert not (tmp_path / "model.part").exists()


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_pull_that_is_stopped_leaves_no_dest_and_goes_on(
    bucket: str, line: Line, tmp_path: Path, by: signal.Signals, status: int
) -> None:
    model = os.urandom(16 * MIB)
    finished(bucket, model)
    line.carried, line.slow_after = 0, 5 * MIB
    pull = [f"{bucket}/one", str(tmp_path / "model")]
    with subprocess.Popen([sys.executable, "-m", "lungct_tune.pull", *pull]) as run:
        deadline = time.monotonic() + 60
        while arrived(tmp_path / "model.part") < 4 * MIB:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(by)
        assert run.wait(60) == status
    assert not (tmp_path / "model").exists()
    kept = arrived(tmp_path / "model.part")
    line.mend()
    assert main(pull) == 0
    assert line.carried < len(model) - kept + MIB
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    verify(tmp_path / "model")


# ---- the head of a cluster ------------------------------------------------------------------------------


def test_a_relative_storage_on_a_head_begins_where_a_search_may_have_been_run() -> None:
    from lungct_tune.experiment.head_node import places_on_head

    assert places_on_head(None) == ["~/results", "~/lungct_tune/results"]
    assert places_on_head("./else where") == ["~/'else where'", "~/lungct_tune/'else where'"]
    assert places_on_head("/shared/results") == ["/shared/results"]
    assert places_on_head("~/results") == ["~/results"]
    with pytest.raises(ValueError, match="leave --cluster out"):
        places_on_head("s3://bucket/results")


def test_a_destination_that_is_taken_is_said_before_a_head_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    for more in ([], ["--all"]):
        assert main(["one", str(tmp_path / "model"), "--cluster", str(tmp_path / "no.yaml"), *more]) == 2
        assert "already exists and was not changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("a: [", "while parsing"),
        ("", "no cluster file of `ray up`"),
        ("- cluster_name", "no cluster file of `ray up`"),
        ("cluster_name: x\nprovider: {type: local, head_ip: h}", "ray exec"),
    ],
)
def test_a_cluster_that_cannot_be_asked_is_said(
    tmp_path: Path, content: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    if content is not None:
        cluster.write_text(content)
    assert main(["one", str(tmp_path / "model"), "--cluster", str(cluster)]) == 2
    said = capsys.readouterr().err
    assert str(cluster) in said and says in said


def test_a_second_pull_of_the_same_search_from_the_same_cluster_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: both wrote to the same folder of the cache, which the first to end deleted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("cluster_name: lab\nprovider: {type: local, head_ip: h}")
    pull = ["one", str(tmp_path / "model"), "--cluster", str(cluster)]
    assert main(pull) == 2 and "ray exec" in capsys.readouterr().err
    (lock,) = (tmp_path / "cache").rglob("*.lock")
    with transfer.locked(lock, ""):
        assert main(pull) == 2
    assert "another pull is fetching one from this cluster" in capsys.readouterr().err
