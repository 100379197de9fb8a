"""The commands: which there are, how they begin and end, and what the user is told."""

from __future__ import annotations

import errno
import os
import pty
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from rich.table import Table

from lungct_tune import __version__
from lungct_tune.cli import COMMANDS, command_words, exit_status, main, terminal
from lungct_tune.errors import UserError
from lungct_tune.stopping import SIGNALS, stop_delayed

HEAVY = {
    "captum",
    "matplotlib",
    "numpy",
    "optuna",
    "pandas",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "torch",
}
"""Packages that take a part of a second to import, or seconds."""


def imported(module: str, *words: str) -> tuple[int, str, set[str]]:
    """Runs `python -m MODULE WORDS` in a new process: its exit status, what it says, what of HEAVY it imports."""
    program = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported", *sorted({HEAVY} & set(sys.modules))))
sys.argv[1:] = {list(words)}
runpy.run_module({module!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said, _, heavy = done.stdout.rpartition("imported")
    return done.returncode, said + done.stderr, set(heavy.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_as_a_module_whose_help_imports_nothing_heavy(command: str) -> None:
    status, said, heavy = imported(f"lungct_tune.{command}", "--help")
    assert status == 0
    assert said.startswith(f"usage: python -m lungct_tune.{command}")
    assert COMMANDS[command] in " ".join(said.split())
    assert not heavy


@pytest.mark.parametrize("command", ["search", "audit"])
def test_a_wrong_value_is_refused_before_anything_heavy_is_imported(command: str, tmp_path: Path) -> None:
    status, said, heavy = imported(f"lungct_tune.{command}", "--data", str(tmp_path / "nowhere"))
    assert status == 2
    assert "nowhere' is not a folder" in said
    assert not heavy


def test_the_list_has_a_line_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    for command, what in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [command, what] for line in lines)


def test_an_unknown_command_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serch"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "no command 'serch' (did you mean search?)" in said and "search, audit" in said


def test_an_option_that_does_not_exist_is_refused_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["search", "--trails", "3", "--xyzzy=1"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "there is no option --trails (did you mean --trials?), --xyzzy=1\n" in said


@pytest.mark.parametrize("words", [[], ["--plan"]])
def test_without_a_command_nothing_is_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: lungct-tune")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lungct-tune {__version__}\n"


def test_a_command_gets_the_words_behind_its_name_and_its_status_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert main(["download", str(tmp_path)]) == 2
    assert "pip install kagglehub" in capsys.readouterr().err


def test_what_the_user_can_mend_is_said_and_gives_2(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise UserError("no such folder")

    assert exit_status(run) == 2
    assert capsys.readouterr().err == "error: no such folder\n"


def test_a_refusal_of_the_system_is_a_sentence_and_another_error_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/ward/images")

    assert exit_status(refused) == 2 and exit_status((tmp_path / ("x" * 300)).exists) == 2
    denied, too_long = capsys.readouterr().err.splitlines()
    assert denied == "error: /ward/images: Permission denied"
    assert too_long == f"error: {tmp_path}/{'x' * 300}: File name too long"
    with open("/dev/full", "wb", buffering=0) as full:
        assert exit_status(lambda: full.write(b"x")) == 2
    assert "the cache (XDG_CACHE_HOME) or of /tmp (TMPDIR): No space left on device" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        exit_status(lambda: (tmp_path / "lost").stat().st_size)


@pytest.mark.parametrize(("own", "said"), [("", "Nothing was written."), ("To continue: x", "To continue: x")])
def test_ctrl_c_says_how_things_stand(own: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise KeyboardInterrupt(*filter(None, [own]))

    assert exit_status(run, "Nothing was written.") == 130
    assert capsys.readouterr().err == f"\nstopped. {said}\n"


def test_an_end_of_its_own_is_kept() -> None:
    assert (exit_status(lambda: None), exit_status(lambda: 1)) == (0, 1)


def test_what_was_noted_of_an_error_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        error = UserError("the node cannot write")
        error.add_note("To continue: search --resume x")
        raise error

    assert exit_status(run) == 2
    assert capsys.readouterr().err == "error: the node cannot write\nTo continue: search --resume x\n"


def test_nothing_that_a_terminal_obeys_and_no_secret_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[31mred\x07\u202e\udcfc s3://me:hunter2@host/x?token=hunter2 [/b]"

    def fail() -> None:
        raise UserError(hostile)

    assert exit_status(fail) == 2
    terminal().print(hostile, hostile)
    table = Table(hostile, title=hostile)
    table.add_row(hostile)
    terminal().print(table)
    said = "".join(capsys.readouterr())
    assert not set("\x1b\x07\u202e\udcfc") & set(said) and "hunter2" not in said
    assert r"\x1b[31mred" in said and "[/b]" in said


def test_no_text_is_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal().print("a long path", *["and more of it"] * 10)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_a_command_to_end_are_a_ctrl_c(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]

    def run() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    assert exit_status(run, "Nothing was written.") == 130
    assert capsys.readouterr().err == "\nstopped. Nothing was written.\n"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_what_was_started_by_nohup_does_not_end_with_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_status(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_can_finish_what_it_does_at_its_end_though_the_signal_comes_again() -> None:
    finished = False

    def run() -> None:
        nonlocal finished
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            finished = True

    assert exit_status(run) == 130 and finished


ENDLESS = """
import sys, time
from lungct_tune.cli import exit_status, terminal
def run():
    console = terminal()
    for line in range(10_000):
        console.print("line", line)
        time.sleep(0.001)
sys.exit(exit_status(run, "Run it again to continue."))
"""


def test_a_command_whose_reader_has_gone_ends_without_a_traceback() -> None:
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(ENDLESS)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("line 0\n130\n", "")
    done = subprocess.run(
        ["bash", "-c", f"{shlex.quote(sys.executable)} -m lungct_tune.search --help | true"], capture_output=True
    )
    assert done.stderr == b""


def test_nothing_is_written_to_a_terminal_that_has_been_closed() -> None:
    """SIGHUP comes from a real terminal; what the command does at its end is still done."""
    ours, theirs = pty.openpty()
    program = """
import sys, time, pathlib
from lungct_tune.cli import exit_status, terminal
def run():
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        terminal().print("to a closed terminal")
        pathlib.Path(sys.argv[1]).write_text("done")
sys.exit(exit_status(run, "x"))
"""
    with tempfile.NamedTemporaryFile() as file:
        command = ["setsid", "--ctty", "--wait", sys.executable, "-c", program, file.name]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"started")
        os.close(ours)
        assert process.wait(timeout=60) == 130
        assert file.read() == b"done"


def test_printed_commands_run_in_this_environment_from_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["search.py"])
    monkeypatch.setenv("PATH", "/usr/bin")
    done = subprocess.run([*command_words("audit"), "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m lungct_tune.audit")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert command_words("audit") == [Path(sys.executable).name, "-m", "lungct_tune.audit"]
    installed = Path(sys.executable).parent / "lungct-tune"
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert command_words("audit") in (["lungct-tune", "audit"], [str(installed), "audit"])


def test_a_stop_waits_for_the_end_of_what_must_not_be_cut_in_two() -> None:
    done: list[str] = []

    def run() -> None:
        with stop_delayed():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            done.append("whole")
        done.append("not reached")

    assert exit_status(run) == 130 and done == ["whole"]
