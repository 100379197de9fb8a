"""Signals that end a command, beside threads that must not be interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from conftest import REPOSITORY

from lungct_tune.stopping import at_stop, interrupt, stop_delayed, was_asked

if TYPE_CHECKING:
    from pathlib import Path


def test_a_stop_is_remembered_while_a_thread_starts_something() -> None:
    """The retraining's slot starts in a thread. Terminals that close send their signal twice."""
    stops: list[int] = []

    def start() -> None:
        with stop_delayed():
            pass

    with at_stop(lambda: stops.append(1)):
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)
        assert was_asked() and stops == [1]


def test_a_stop_stays_known_in_a_block_inside_of_another_one() -> None:
    with at_stop(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        with stop_delayed():
            assert was_asked()
        assert was_asked()
    with at_stop(lambda: None):
        assert not was_asked(), "another command"


@pytest.mark.parametrize("how", [["-m", "lungct_tune.search"], ["lungct-tune", "search"]])
def test_ctrl_c_outside_of_what_a_command_does_ends_it_without_a_traceback(how: list[str], tmp_path: Path) -> None:
    """While it is imported, and at its end, where users type Ctrl-C again."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "lungct-tune").write_text("from lungct_tune.cli import main\nmain()\n")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *how]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    library = "import lungct_tune, signal; signal.raise_signal(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", library], env=environment, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr, "in a program of the user it is as before"


def test_a_cluster_that_was_started_here_is_shut_down_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: Ctrl-C in the middle left a process that waited for a minute, and ended with status 1."""
    from lungct_tune.tuning import cluster

    ended = list[bool]()

    def shutdown() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append(True)

    monkeypatch.setattr(cluster, "connect", lambda *_: "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", shutdown)
    with at_stop(interrupt), pytest.raises(KeyboardInterrupt), cluster.joined(None, False, "one"):
        pass
    assert ended
