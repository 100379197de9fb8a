"""Whole searches whose storage is elsewhere: an S3 server that fails now and then, a study in PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest
from conftest import SMALL, SPACE
from optuna.trial import TrialState
from processes import free_port, searching, wait_for
from s3 import KEY, SECRET, Faulty, environment, put
from studies import epochs_of, trials_in

from lungct_tune.experiment.bundle import verify
from lungct_tune.experiment.folder import Experiment
from lungct_tune.search import main

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.long, pytest.mark.ray]

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
    failing.now_and_then({500: 0.05, 503: 0.05}, seed=1, stalls={50, 100, 200})
    store = ["--storage", "s3://bucket/searches"]
    begin = ["--name", "one", "--data", "s3://bucket/ct", "--space", str(tmp_path / "space.yaml"), *SMALL, *TRIALS]
    with contextlib.ExitStack() as heads:
        first, first_disk = heads.enter_context(head(failing, *store, *begin))
        wait_for(lambda: any(trial.user_attrs.get("history") for trial in copied_trials()), first)
        first.kill()
        outputs = [first.communicate()[0]]
        before = copied_trials()
        second, second_disk = heads.enter_context(head(failing, *store, "--resume", "one", "--data", "s3://bucket/ct"))
        outputs.append(second.communicate(timeout=900)[0])
        assert second.returncode == 0, outputs
        print(*outputs, f"requests passed on and checksum_errors: {dict(failing.answered)}", sep="\n")

        trials = copied_trials()
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        for trial in trials:
            epochs = [figures["epoch"] for figures in epochs_of(trial)]
            assert epochs == list(range(1, len(epochs) + 1))
        for had, has in zip(before, trials, strict=False):  # they went on, from states that may be older
            epochs = figures_of(had)
            assert figures_of(has)[: len(epochs)] == epochs
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


def figures_of(trial: optuna.trial.FrozenTrial) -> list[dict[str, float]]:
    """The figures of its epochs, without when and where they were trained."""
    kept = ("epoch", "balanced_accuracy", "accuracy", "log_loss", "train_loss")
    return [{name: figures[name] for name in kept} for figures in epochs_of(trial)]


def copied_trials() -> list[optuna.trial.FrozenTrial]:
    """The trials in the copy of the study, which a head's loss leaves."""
    return trials_in(Experiment.at("s3://bucket/searches", "one"))


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
