"""How an entrance ends: its exit status, and what the user is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lungct_tune.cli import exit_status
from lungct_tune.errors import UserError


def test_what_the_user_can_mend_is_said_and_gives_2(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise UserError("no such folder")

    assert exit_status(run) == 2
    assert capsys.readouterr().err == "error: no such folder\n"


@pytest.mark.parametrize(("own", "said"), [("", "Nothing was written."), ("To go on: x", "To go on: x")])
def test_ctrl_c_says_how_things_stand(own: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise KeyboardInterrupt(*filter(None, [own]))

    assert exit_status(run, "Nothing was written.") == 130
    assert capsys.readouterr().err == f"\nstopped. {said}\n"


def test_an_end_of_its_own_is_kept() -> None:
    assert (exit_status(lambda: None), exit_status(lambda: 1)) == (0, 1)


@pytest.mark.parametrize("command", ["search", "audit", "evaluate", "report", "replay", "pull", "download"])
def test_every_command_runs_as_a_module(command: str) -> None:
    ended = subprocess.run([sys.executable, "-m", f"lungct_tune.{command}", "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and f"lungct_tune.{command}" in ended.stdout
